"""The figures of a report, drawn with matplotlib in one look."""

import logging

# What is no news: a first run makes a cache of fonts, and a PDF gets those of their glyphs that it uses.
for name in ("matplotlib.font_manager", "fontTools"):
    logging.getLogger(name).setLevel(logging.WARNING)
