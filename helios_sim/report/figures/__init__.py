"""The figures of a report, drawn with matplotlib in one look."""

import logging

logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)  # a first run makes a cache, which is no news
