"""Serving: an engine that requests join and leave, and OpenAI's API in front of it."""
