"""Ways to vary a setting, and one runner for what comes of them: axes, settings by path, tasks that resume."""
