"""Settings of torch that belong to the user's process, and that what a policy computes must not depend on."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_own_settings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Call the function without autocast and with float32 as the default dtype; the user's are set again afterwards.

    The default dtype is the whole process's: where a user has another, threads that make tensors meanwhile see float32.
    Processes that are forked afterwards have one thread of torch.
    """

    @wraps(function)
    def called(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        _forks_have_one_thread()
        dtype = torch.get_default_dtype()
        if dtype is torch.float32 and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return function(*arguments, **named)
        torch.set_default_dtype(torch.float32)
        try:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*arguments, **named)
        finally:
            torch.set_default_dtype(dtype)

    return called


@cache
def _forks_have_one_thread() -> None:
    """A fork has none of torch's threads, and waits for them for ever in the first operation that is shared out."""
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
