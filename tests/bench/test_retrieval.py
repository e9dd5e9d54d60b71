"""The default policy in the benchmarks is the default preset's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import retrieval
import torch

from llmdpd.config.presets import find_preset
from llmdpd.nn.policy_network import States

CPU = torch.device("cpu")


def test_the_method_is_the_presets() -> None:
    assert find_preset("metaworld").method == retrieval.METHOD


def test_the_policy_acts_and_the_tracker_does_not() -> None:
    of = retrieval.policy(True, CPU)
    for states in (1, 3):
        policies: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(of), "act", recording(type(of).act, policies))
            act = retrieval.our_action(of, np.zeros((states, retrieval.STATE), np.float32))
            for _ in range(retrieval.DEMONSTRATION):
                act()
        assert not policies[0].tracked.any()
        for _ in range(retrieval.DEMONSTRATION):
            policies[0].act(np.zeros((states, retrieval.STATE), np.float32))
        assert policies[0].tracked.all(), "it would, where the body stands still"


def recording(act: Any, policies: list[Any]) -> Any:
    def recorded(self: Any, *given: Any) -> Any:
        policies.append(self)
        return act(self, *given)

    return recorded


def test_operations_are_those_of_the_products_counted_by_torch() -> None:
    """Within what is not counted: norms' and softmaxes' products, the text head's and the retrieval's small ones."""
    from torch.utils.flop_counter import FlopCounterMode

    of = retrieval.policy(False, CPU)
    prompts = of.encode_prompts([retrieval.TASK], [retrieval.demonstration(np.random.default_rng())])
    state = torch.randn(64, retrieval.STATE)
    retrieval.in_torch(True)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            of.network.sample(
                States(state, None, torch.zeros(64, dtype=torch.int64)), prompts, of.acting, torch.arange(64)
            )
        counted = counter.get_total_flops()  # the chain is in C++, which it does not see
        assert counted == pytest.approx(128.0 * retrieval._look_up(of.network), rel=0.1)
        iteration = retrieval.Iteration(False, CPU)
        with FlopCounterMode(display=False) as counter:
            iteration.update()
        assert counter.get_total_flops() == pytest.approx(iteration.flops(), rel=0.12)
    finally:
        retrieval.in_torch(False)
