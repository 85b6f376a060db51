"""The front process: HTTP, tokenizers, limits and metrics. A pipe connects it to the engine's process."""
