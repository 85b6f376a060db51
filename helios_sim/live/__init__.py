"""Early-exit models on a real device (torch). Importing this package loads no torch; most of its modules do."""
