"""Learners that take turns in one process, as runs of several seeds do: each learns what it learns alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmdpd.methods import METHODS
from llmdpd.training.together import Generators

OFFLINE = [name for name, kind in METHODS.items() if not kind.online]


@pytest.mark.parametrize("name", OFFLINE)
def test_every_method_learns_in_turns_what_it_learns_alone(name: str, make_method: Any, make_batch: Any) -> None:
    """Nothing but torch's generators is shared by learners of one process."""
    first = make_method(name, iterations=6)
    window = first.policy.window
    batches = [[make_batch(B=6, P=2, H=window.horizon, before=window.before) for _ in range(6)] for _ in range(2)]
    learners = [first, make_method(name, iterations=6)]
    copies = copy.deepcopy(learners)
    for number, learner in enumerate(copies):
        torch.manual_seed(number)
        for iteration, batch in enumerate(batches[number]):
            learner.update(batch, iteration)
    generators = [Generators(torch.device("cpu")), Generators(torch.device("cpu"))]
    for iteration in range(6):
        for number, learner in enumerate(learners):
            with generators[number].active():
                if iteration == 0:
                    torch.manual_seed(number)
                learner.update(batches[number][iteration], iteration)
    for learner, expected in zip(learners, copies, strict=True):
        for part, module in learner.modules.items():
            own, other = module.state_dict(), expected.modules[part].state_dict()
            assert all(torch.equal(own[key], other[key]) for key in own), part
