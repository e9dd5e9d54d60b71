"""Command lines of dataclasses: errors in a few lines, the nearest names, one line of help an option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.utils.command_line import option_lines, parse, take_option


@dataclass(frozen=True)
class Inner:
    """A part."""

    rate: float = 0.5
    """How fast."""
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Base:
    """What others inherit."""

    count: int = 1
    """How many, in words that go on and on, and on, and on, until no line of any terminal can hold them all."""


@dataclass(frozen=True)
class Outer(Base):
    """A whole."""

    inner: Inner = field(default_factory=Inner)
    flag: bool = True
    """Whether."""


def test_words_become_a_dataclass() -> None:
    words = ["--count", "3", "--inner.names", "x", "--no-flag"]
    assert parse(Outer, words, "prog") == Outer(3, Inner(names=("x",)), False)
    assert parse(Outer, [], "prog", Outer(7)) == Outer(7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cuont", "3"], "no such option\n  found:    --cuont\n  expected: perhaps --count"),
        (["--inner.rat=1"], "no such option\n  found:    --inner.rat=1\n  expected: perhaps --inner.rate"),
        (["--otherwise"], "expected: perhaps --other"),
        (["--count", "x"], "invalid literal"),
        (["more"], "Unrecognized options: more"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(Outer, words, "prog", known=["--other"])
    assert message in str(error.value)
    assert str(error.value).endswith("hint:     prog --help lists the options")
    assert "│" not in str(error.value)


def test_help_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Outer, ["--help"], "prog")
    assert stop.value.code == 0
    assert "How fast." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "value", "rest"),
    [
        (["--a", "--run-dir", "x", "b"], "x", ["--a", "b"]),
        (["--run_dir=x=y", "b"], "x=y", ["b"]),
        (["--run-dir", "x", "--run-dir", "y"], "y", []),
        (["--run-directory", "x"], None, ["--run-directory", "x"]),
    ],
)
def test_an_option_is_taken_out(words: list[str], value: Any, rest: list[str]) -> None:
    assert take_option(words, "--run-dir") == (value, rest)
    with pytest.raises(InputError, match="without its value"):
        take_option([*rest, "--run-dir"], "--run-dir")


def test_one_line_for_each_option() -> None:
    lines = option_lines(Outer(flag=False), width=100, hidden=["inner.names"])
    assert [line.split()[0] for line in lines] == ["--count", "--flag", "--inner.rate"]
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith("…")
    assert [line.index(text) for line, text in zip(lines, ("How many", "Whether.", "How fast."), strict=True)] == [
        lines[0].index("How many")
    ] * 3
    assert lines[1].split()[1] == "False"
    assert "names a b" in "\n".join(option_lines(Outer()))
