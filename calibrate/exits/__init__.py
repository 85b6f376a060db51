"""Early exits of a real model: labelled texts, training of exit heads, and exit traces."""
