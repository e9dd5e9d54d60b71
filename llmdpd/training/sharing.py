"""Training by several processes: each learns from its share of every batch, and all take the same steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.base import Learner, MethodConfig, OfflineConfig
from llmdpd.utils import ranks, sharding
from llmdpd.utils.checkpoint import Checkpointed
from llmdpd.utils.sharding import Share, share_of


class SharedUpdate:
    """A learner, for the training loop, whose batches are this process's share of the whole ones."""

    def __init__(self, learner: Learner, share: Share) -> None:
        self._learner, self._share = learner, share
        self.modules: Mapping[str, nn.Module] = learner.modules
        self.optimizers: Mapping[str, torch.optim.Optimizer] = learner.optimizers

    def update(self, batch: Any, iteration: int) -> dict[str, Tensor]:
        """An iteration, which leaves the same weights in all processes; its metrics are of the share."""
        with sharding.active(self._share):
            return self._learner.update(batch, iteration)


def own_share(kind: type[Learner], config: MethodConfig) -> Share | None:
    """This process's share of a method's batches; None where it is the only process.

    Raises:
        InputError: the method's batches, or batches of this size, can't be shared.
    """
    if ranks.count() == 1:
        return None
    found = f"{config.name} in {ranks.count()} processes"
    if kind.unshared or not isinstance(config, OfflineConfig):
        raise InputError(
            f"several processes cannot share this method's training: {kind.unshared}",
            field="method",
            found=found,
            expected="one process",
            hint="start it without torchrun, or with --nproc-per-node 1",
        )
    return share_of(ranks.rank(), ranks.count(), config.batch_size, config.prompts_per_batch)


def check_alike(learner: Checkpointed) -> None:
    """Hold that all processes have the same weights, bit for bit.

    Raises:
        InputError: in all of them, where one has not.
    """
    if ranks.count() == 1:
        return
    digest = hashlib.sha256()
    for module in learner.modules.values():
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    ranks.check_same("weights", digest.hexdigest())
