"""Settings of torch that belong to the user's process, and that what a policy computes must not depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_own_settings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Call the function without autocast, with float32 as the default dtype, and on one of torch's CPU threads.

    The user's settings are set again afterwards. Torch's threads wait for each other at every operation, spinning: on a
    busy machine that costs many times what these small operations take. The default dtype is the whole process's: where
    a user has another, threads that make tensors meanwhile see float32; and a thread whose very first operation of
    torch falls into this one may keep one thread.
    """

    @wraps(function)
    def called(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with _one_thread():
            dtype = torch.get_default_dtype()
            if (
                dtype is torch.float32
                and not torch.is_autocast_enabled("cpu")
                and not torch.is_autocast_enabled("cuda")
            ):
                return function(*arguments, **named)
            torch.set_default_dtype(torch.float32)
            try:
                with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                    return function(*arguments, **named)
            finally:
                torch.set_default_dtype(dtype)

    return called


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
