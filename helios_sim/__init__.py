"""Design, simulate and validate early-exit LLM serving with adaptive model selection."""

__version__ = "0.1.0"
