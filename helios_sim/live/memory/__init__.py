"""Device memory while serving: KV caches with their slots, and the weights that are resident."""
