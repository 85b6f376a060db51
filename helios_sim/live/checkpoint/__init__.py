"""Checkpoints: safetensors folders, GGUF files, hub models, and random weights in a known shape."""
