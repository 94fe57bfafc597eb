"""Trees: which combinations of the heads' guesses are verified together."""
