"""The templates of self-contained pages. Compiling them takes 0.03 s, so the result is kept on disk."""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import BytecodeCache, ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.report import format as fmt
from helios_sim.shared_data import cache_folder

if TYPE_CHECKING:
    from jinja2.bccache import Bucket

_DIGEST_BYTES = 32


class _Kept(BytecodeCache):
    """Compiled templates on disk, with a digest: damaged byte code could crash the interpreter.

    If the folder cannot be written, they are not kept.
    """

    def __init__(self) -> None:
        made_by = "|".join([sys.version, version("jinja2")]).encode() + Path(__file__).read_bytes()
        self._folder = cache_folder() / "templates" / hashlib.sha256(made_by).hexdigest()[:16]

    def load_bytecode(self, bucket: Bucket) -> None:
        with suppress(OSError):
            content = (self._folder / bucket.key).read_bytes()
            digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                bucket.bytecode_from_string(code)

    def dump_bytecode(self, bucket: Bucket) -> None:
        code = bucket.bytecode_to_string()
        with suppress(UserError):
            files.write_bytes(self._folder / bucket.key, hashlib.sha256(code).digest() + code)


@cache
def page_environment(*packages: str) -> Environment:
    """The templates of these packages and ours, with the style sheet and the script of self-contained pages.

    An undefined name is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "helios_sim.report")]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        finalize=lambda value: fmt.visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=_Kept(),
    )
    assert environment.loader is not None
    for name, file in (("css", "report.css"), ("charts", "charts.js")):
        source = environment.loader.get_source(environment, file)[0]
        environment.globals[name] = Markup(source)  # noqa: S704 - a file of the package
    return environment
