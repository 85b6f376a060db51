"""Comparisons of a real run with its simulation: a serving log of vLLM, or live serving by this program."""
