"""A mark for functions that torch.compile evaluates while it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_compiled(function: Function) -> Function:
    """Mark a function: torch.compile calls it while it compiles, and takes its result as a constant.

    `torch.compiler.assume_constant_result` sets the same mark, and imports all of torch.compile to do so: two seconds
    of every process that only evaluates or acts.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
