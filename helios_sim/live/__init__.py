"""Early-exit models on a real device (torch). Importing this package loads nothing; its modules load torch."""
