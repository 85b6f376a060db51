"""Ways to vary settings, and the runner of the tasks that follow: axes, settings by path, tasks that resume."""
