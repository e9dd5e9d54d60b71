"""What a hyper-parameter search varies: options of `llmdpd train`, each with the values that it may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmdpd.errors import InputError

_EXPECTED = "OPTION=log:LOW:HIGH, OPTION=float:LOW:HIGH, OPTION=int:LOW:HIGH[:STEP] or OPTION=A,B,…"


@dataclass(frozen=True)
class Dimension:
    """An option and its values. Of the kind "choice" they are `choices`, else lie between `low` and `high`, both
    included: "log" (uniform in the logarithm), "float", "int" (`low` plus multiples of `step`)."""

    option: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    step: int = 1
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Any) -> Any:
        """The value that an Optuna trial takes."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.option, self.choices)
        if self.kind == "int":
            return trial.suggest_int(self.option, int(self.low), int(self.high), step=self.step)
        return trial.suggest_float(self.option, self.low, self.high, log=self.kind == "log")

    def words(self, value: Any) -> tuple[str, str]:
        """The option with a value, as `llmdpd train` takes it."""
        return f"--{self.option}", str(value)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that show whether the option takes them: every choice, or the lowest and the highest number."""
        if self.kind == "choice":
            return self.choices
        if self.kind != "int":
            return self.low, self.high
        low, high = int(self.low), int(self.high)
        return low, low + (high - low) // self.step * self.step


def read_dimension(words: str) -> Dimension:
    """A dimension from the command line.

    Raises:
        InputError: anything else than `OPTION=KIND:LOW:HIGH` or `OPTION=A,B`.
    """
    option, sign, values = words.partition("=")
    option = option.removeprefix("--")

    def refuse(problem: str) -> InputError:
        return InputError(problem, field="--search", found=words, expected=_EXPECTED)

    if not (option and sign and values):
        raise refuse("a search without an option or its values")
    kind, *numbers = values.split(":")
    if not numbers:
        choices = tuple(dict.fromkeys(values.split(",")))
        if len(choices) < 2 or "" in choices:
            raise refuse("a choice needs two values at least")
        return Dimension(option, "choice", choices=choices)
    if kind not in ("log", "float", "int") or len(numbers) not in ((2, 3) if kind == "int" else (2,)):
        raise refuse("no such kind of search")
    read: Callable[[str], float] = int if kind == "int" else float
    try:
        low, high, step = (*(read(number) for number in numbers), 1)[:3]
    except ValueError:
        raise refuse("a bound that is no number") from None
    if not low < high < math.inf or low == -math.inf or step < 1 or (kind == "log" and low <= 0):
        raise refuse("impossible bounds")
    return Dimension(option, kind, low, high, int(step))
