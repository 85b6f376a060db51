"""The front process: HTTP, tokenizers, limits and metrics. The engine is in another process, behind a pipe."""
