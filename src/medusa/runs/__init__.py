"""Runs: files that are complete or absent, records that a run resumes from, what a figure was made with."""
