"""Early exits: rules for when a token leaves, recorded traces of every exit, and the replay of a trace under a rule."""
