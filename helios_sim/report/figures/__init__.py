"""The figures of a report, drawn with matplotlib in one look."""

import logging
import sys

# What is no news: a first run makes a cache of fonts, and a PDF gets those of their glyphs that it uses.
for name in ("matplotlib.font_manager", "fontTools"):
    logging.getLogger(name).setLevel(logging.WARNING)


def _import_without_lists() -> None:
    """Keep matplotlib from writing all properties of its classes into docstrings: a third of the time of its import.

    Where a person may ask for help, in a notebook or at a prompt, it writes them.
    """
    if "matplotlib.figure" in sys.modules or "IPython" in sys.modules or hasattr(sys, "ps1"):
        return
    from matplotlib import artist

    setattr(artist, "kwdoc", lambda _: "")  # noqa: B010
    setattr(artist.Artist, "_update_set_signature_and_docstring", classmethod(lambda _: None))  # noqa: B010


_import_without_lists()
