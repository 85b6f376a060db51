"""Where the templates of self-contained pages are, and the look that they share. Knows no page's content."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def page_environment() -> tuple[Environment, Markup]:
    """Templates in which a name that is not given is an error, and the style sheet."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    loader = PackageLoader("helios_sim.report")
    environment = Environment(
        loader=loader,
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment, Markup(loader.get_source(environment, "report.css")[0])
