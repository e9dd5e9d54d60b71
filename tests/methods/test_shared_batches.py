"""Methods whose batches several processes share: the weights are those of one process, but for rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.base import Method
from llmdpd.methods.batch import PromptedBatch
from llmdpd.training.sharing import SharedUpdate, check_alike, own_share
from llmdpd.utils import ranks
from llmdpd.utils.sharding import Share, share_of

NAMES = [name for name, kind in METHODS.items() if not kind.unshared]
B = 24
OPTIONS: dict[str, dict[str, Any]] = {
    "pnf": {"model_share": 0.2},
    "ads": {"start": 0.2},
    "s4rl": {"states.kind": "mixup"},
    **{name: {"network.sequence.dropout": 0.2} for name in ("dt", "prompt-dt")},
    "lamo": {"network.sequence.dropout": 0.2, "network.lora.dropout": 0.3},
    **{name: {"network.trajectory.dropout": 0.2} for name in ("mtdiff", "trajectory-diffusion")},
    **{name: {"network.context.encoder.dropout": 0.2} for name in ("llmdpd", "diffusion-ql", "diffusion-bc")},
}
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("llmdpd", {"eta": 0, "network.chunk": 3}),
    ("ads", {"split": "adversarial"}),
    ("rad", {"states.kind": "gaussian"}),
    *(("s4rl", {"states.kind": kind}) for kind in ("gaussian", "uniform", "dropout", "adversarial")),
]
SHARED = ((2, 4), (4, 2), (4, 6))
"""Processes and prompts."""
Iterate = Callable[[Any, Callable[[PromptedBatch], PromptedBatch]], None]


@pytest.fixture
def iterate(make_batch: Callable[..., PromptedBatch]) -> Callable[..., Iterate]:
    """Trains a learner for a few iterations, on what a function makes of batches, under the same random numbers."""

    def prepare(method: Method[Any, Any], prompts: int) -> Iterate:
        window = method.policy.window
        batches = [make_batch(B=B, P=prompts, H=window.horizon, before=window.before) for _ in range(6)]
        keep = (torch.arange(prompts)[:, None] != 1).float()
        batches[1] = dataclasses.replace(batches[1], keep=dataclasses.replace(batches[1].keep, trajectory=keep))

        def run(learner: Any, of: Callable[[PromptedBatch], PromptedBatch]) -> None:
            torch.manual_seed(5)
            for number, batch in enumerate(batches):
                learner.update(of(batch), number)

        return run

    return prepare


def weights(learner: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, module in learner.modules.items() for key, t in module.state_dict().items()}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: str(value) if value else "")
def test_processes_learn_what_one_does(
    name: str,
    changes: dict[str, Any],
    make_method: Any,
    iterate: Any,
    in_processes: Any,
    tmp_path: Path,
) -> None:
    # Whole prompts, parts of one, and parts of some.
    count, prompts = SHARED[VARIANTS.index((name, changes)) % 3]
    method = make_method(name, iterations=6, **(OPTIONS.get(name, {}) | changes))
    for optimizer in method.optimizers.values():
        for group in optimizer.param_groups:
            group["eps"] = 0.1  # Adam's first steps are of one length, where a gradient is nothing but rounding, too
    method._rates = dict.fromkeys(method._rates, 0.03)
    train = iterate(method, prompts)
    config = dataclasses.replace(method.config, batch_size=B, prompts_per_batch=prompts)

    def work(number: int) -> None:
        with ranks.joined():
            share = own_share(type(method), config)
            assert share is not None
            shared = SharedUpdate(method, share)
            train(shared, lambda batch: batch.part(share))
            check_alike(shared)
            if number == 0:
                torch.save(weights(method), tmp_path / "weights.pt")

    assert in_processes(count, work) == [0] * count
    before = {key: value.clone() for key, value in weights(method).items()}
    train(method, lambda batch: batch)
    found = torch.load(tmp_path / "weights.pt")
    alone = weights(method)
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        moved, error = (float((other - value).abs().max()) for other in (before[key], found[key]))
        assert error <= 5e-3 * moved + 1e-6 * float(value.abs().max()), (key, moved, error)
    assert any(not torch.equal(before[key], value) for key, value in alone.items() if key.startswith("policy."))


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.unshared])
def test_what_cannot_be_shared_says_so(name: str, in_processes: Any) -> None:
    def work(number: int) -> None:
        with ranks.joined(), pytest.raises(InputError, match="several processes cannot share this method") as raised:
            own_share(METHODS[name], METHODS[name].Config())
        assert METHODS[name].unshared in str(raised.value)

    assert in_processes(2, work) == [0, 0]
    assert own_share(METHODS[name], METHODS[name].Config()) is None


@pytest.mark.parametrize(
    ("count", "batch", "prompts"), [(1, 6, 3), (2, 12, 4), (4, 12, 2), (4, 24, 6), (6, 24, 4), (3, 9, 1)]
)
def test_shares_are_all_of_a_batch(count: int, batch: int, prompts: int) -> None:
    shares = [share_of(rank, count, batch, prompts) for rank in range(count)]
    assert sorted(torch.cat([share.rows.own for share in shares]).tolist()) == list(range(batch))
    for share in shares:
        # As in whole batches the transitions lie in equal groups, one a prompt, in the prompts' order.
        of = share.rows.own // (batch // prompts)
        assert of.tolist() == share.prompts.own.repeat_interleave(len(of) // len(share.prompts.own)).tolist()


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(InputError, match="shared out evenly among the processes") as raised:
        share_of(0, 4, 6, 2)
    assert raised.value.field == "method.batch_size"
    assert raised.value.expected == "a multiple of 4"
    assert "--method.batch-size 8" in str(raised.value.hint)


def test_own_rows_of_several_blocks() -> None:
    share: Share = share_of(1, 2, 4, 2)
    whole = torch.arange(24).view(3, 8)  # two blocks of a batch of 4
    assert share.rows.of(whole, dim=1).tolist() == [[2, 3, 6, 7], [10, 11, 14, 15], [18, 19, 22, 23]]
    assert share.rows.whole_shape((3, 4), dim=1) == (3, 8)
