"""For measuring real early-exit models. So far it only fetches their weights."""
