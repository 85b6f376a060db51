"""Many iterations of one replica at once, compiled, up to the next moment at which only Python can go on."""
