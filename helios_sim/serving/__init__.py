"""The serving loop: scheduler, KV memory, placements and the server process of one replica."""
