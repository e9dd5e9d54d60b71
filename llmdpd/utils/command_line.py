"""Command lines of nested dataclasses: parsing by tyro, short errors, a help of one line for each option."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

from llmdpd.errors import InputError
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import error_console

with extra("cli"):
    import tyro

T = TypeVar("T")
_COLUMN = 46
"""Where descriptions begin in a help of one line for each option."""


def parse(
    config_type: Callable[..., T],
    words: Sequence[str],
    prog: str,
    default: T | None = None,
    description: str | None = None,
    known: Collection[str] = (),
) -> T:
    """What `tyro.cli` makes of a command's words; --help prints, and ends the process.

    `known` are options that exist beside those that --help shows, for naming the nearest ones.

    Raises:
        InputError: an option that does not exist, with the nearest ones, or a value that cannot be used.
    """

    def read(args: Sequence[str]) -> T:
        given: dict[str, Any] = {} if default is None else {"default": default}
        return tyro.cli(config_type, args=args, prog=prog, description=description, **given)

    if {"-h", "--help"} & set(words):
        return read(words)
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return read(words)
    except SystemExit as stop:
        if stop.code != 2:
            raise
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        read(["--help"])
    # What an option's description mentions is another command's.
    lines = [line.strip("│ ").split("  ")[0] for line in shown.getvalue().splitlines()]
    options = {*known, *(name for line in lines if line[:1] == "-" for name in re.findall(r"--[a-z][\w.-]*", line))}
    help_hint = f"{prog} --help lists the options"
    for word in words:
        name = word.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in options:
            near = difflib.get_close_matches(name, sorted(options), n=3, cutoff=0.5)
            expected = f"perhaps {' or '.join(near)}" if near else None
            raise InputError("no such option", found=word, expected=expected, hint=help_hint)
    # Without the title and the box that tyro puts around its message, plain where the terminal is, and the hint below.
    parts = re.split("[─-]{9,}", re.sub("[│╭╮╰╯]", " ", said.getvalue().split("\n", 1)[-1]))
    raise InputError(" ".join(next(filter(str.strip, parts)).split()), hint=help_hint)


def renamed(words: Sequence[str], table: Mapping[str, str]) -> list[str]:
    """The words with options of the last version, `table`'s keys, in today's spelling; a line to stderr for each.

    A switch's other form is meant too: with {"--a.b": "--a.c"}, --a.no-b becomes --a.no-c.
    """
    spellings = dict(table) | {switched_off(old): switched_off(new) for old, new in table.items()}
    changed = list(words)
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        if new := spellings.get(name.replace("_", "-")):
            error_console.print(f"{name} is now {new}; the old spelling goes in the next version")
            changed[place] = f"{new}{sign}{value}"
    return changed


def switched_off(option: str) -> str:
    """The form of a switch that turns it off: --a.b becomes --a.no-b."""
    part, dot, name = option.removeprefix("--").rpartition(".")
    return f"--{part}{dot}no-{name}"


def take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` (None where absent), and the other words.

    Raises:
        InputError: the option is the last word and has no value, or an empty one, as of a shell's variable that is not
            set.
    """
    rest, value, words = [], None, iter(arguments)
    for word in words:
        # tyro takes --run_dir for --run-dir, so the options beside it do too.
        option, sign, given = word.partition("=")
        if option.replace("_", "-") != name:
            rest.append(word)
        elif not (value := given if sign else next(words, None)):
            found = None if value is None else "''"
            raise InputError("an option without its value", field=name, found=found, expected=f"{name} VALUE")
    return value, rest


def option_lines(config: Any, width: int = 100, hidden: Collection[str] = ()) -> list[str]:
    """One line for each option of a configuration: its name, its default, the beginning of its description.

    Args:
        config: a dataclass whose values are the defaults. width: of a line. hidden: dotted fields that are left out.
    """
    lines: list[str] = []
    for field, value, description in _fields(config, ""):
        if any(field == name or field.startswith(f"{name}.") for name in hidden):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        name = f"  --{field.replace('_', '-')} {shown if len(shown) <= 22 else shown[:21] + '…'}"
        room = width - max(len(name), _COLUMN) - 2
        lines.append(f"{name:<{_COLUMN}}  {textwrap.shorten(description, max(room, 20), placeholder=' …')}")
    return lines


def suppressed(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields, or parts, of nested dataclasses that are marked as no options."""
    hidden = _suppressed(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        if field.name in hidden:
            yield f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from suppressed(value, f"{prefix}{field.name}.")


@cache
def _suppressed(kind: type[Any]) -> frozenset[str]:
    """Names of a dataclass's own fields that are marked as no options."""
    hints = get_type_hints(kind, include_extras=True)
    return frozenset(name for name, hint in hints.items() if tyro.conf.Suppress in getattr(hint, "__metadata__", ()))


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """The leaves of nested dataclasses: dotted name, value, description; a section's own fields before its parts."""
    described = _descriptions(type(config))  # type: ignore[arg-type]
    parts = [field.name for field in dataclasses.fields(config)]
    nested = [name for name in parts if dataclasses.is_dataclass(getattr(config, name))]
    for name in parts:
        if name not in nested:
            yield f"{prefix}{name}", getattr(config, name), described.get(name, "")
    for name in nested:
        yield from _fields(getattr(config, name), f"{prefix}{name}.")


@cache
def _descriptions(kind: type[Any]) -> dict[str, str]:
    """The texts that stand below a dataclass's fields in its source, and in those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found
