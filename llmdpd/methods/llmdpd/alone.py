"""A learner of Algorithm 1 without prompts whose iterations are prepared once: a stack of one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch, cloned_actions
from llmdpd.methods.llmdpd.stack import Stack, stackable
from llmdpd.methods.llmdpd.steps import can_step
from llmdpd.nn.context.base import PooledContext
from llmdpd.ops import layers
from llmdpd.ops.together import prepared_for, show_gradients
from llmdpd.ops.unchanged import Unchanged, same_objects
from llmdpd.utils import sharding

if TYPE_CHECKING:
    from llmdpd.methods.llmdpd.method import LLMDPD

_PAUSE = 100  # iterations, after one that could not be prepared


class _Prepared(NamedTuple):
    """A stack of one, and what it was prepared for."""

    stack: Stack
    unchanged: Unchanged
    kind: tuple[Any, ...]
    made: tuple[object, ...]


class Alone:
    """The stack that a learner alone is in, for as long as all lies where it lay."""

    def __init__(self) -> None:
        self._prepared: _Prepared | None = None
        self._versions: list[int] = []
        self._pause = 0

    def __deepcopy__(self, memo: Any) -> Alone:
        return Alone()  # a learner's copy prepares its own

    def update(self, learner: LLMDPD, batch: PromptedBatch, iteration: int) -> dict[str, Tensor] | None:
        """As `LLMDPD.update`, with the same bits; None, and nothing done, where no stack takes the learner."""
        if not _possible(learner, batch):
            return None
        kind, prepared = (len(batch.rewards), *prepared_for()), self._prepared
        # Of the average's weights the stack has a copy.
        held = prepared is not None and prepared.kind == kind and self._versions == _versions(learner)
        held = held and prepared is not None and same_objects(learner.made_of, prepared.made)
        if prepared is None or not held or not prepared.unchanged.holds():
            if self._pause:
                self._pause -= 1
                return None
            prepared = self._prepared = _prepare(learner, kind)
        if prepared is None:
            self._pause = _PAUSE
            return None
        metrics = prepared.stack.update([batch], iteration, [torch.default_generator])[0]
        show_gradients(prepared.stack.gradients(0))
        self._versions = _versions(learner)
        return metrics


def _possible(learner: LLMDPD, batch: PromptedBatch) -> bool:
    """Whether the learner is of the kind that stacks take, in a state of torch in which they may compute."""
    context = learner.policy.context
    if not learner.config.eta or type(context) is not PooledContext or context.prompt_dim or sharding.is_shared():
        return False
    if not learner.policy.training:  # as it learns
        learner.policy.train()
    given = [batch.observations, batch.next_observations, batch.actions, batch.rewards, batch.terminals]
    given.append(cloned_actions(batch, learner.config.clone))
    return (
        layers.computes(*given)
        and not any(part.requires_grad for part in given)
        and torch.is_grad_enabled()
        and torch.get_default_dtype() is torch.float32
    )


def _prepare(learner: LLMDPD, kind: tuple[Any, ...]) -> _Prepared | None:
    """None where the learner has something that the stack doesn't compute, as hooks."""
    optimizers = [learner.optimizers[f"{name}_optimizer"] for name in ("policy", "critic")]
    learned = [*zip((learner.policy, learner.critic), optimizers, strict=True)]
    if not stackable([learner]) or not all(can_step(optimizer, network) for network, optimizer in learned):
        return None
    stack = Stack([weakref.proxy(learner)])  # which the learner holds itself
    stack.prepare(kind[0])
    unchanged = Unchanged(learned, [learner.target_critic, learner.ema_policy])
    if not unchanged.holds():
        return None
    return _Prepared(stack, unchanged, kind, learner.made_of)


def _versions(learner: LLMDPD) -> list[int]:
    return [parameter._version for parameter in learner.ema_policy.parameters()]
