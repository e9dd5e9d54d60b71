"""An iteration of Algorithm 1 that clones alone, with the retrieval context, prepared once.

It is `LLMDPD.update` without the reward term, written out: what the loss differentiates by autograd is called here by
name, on memory that stays where it is. Autograd, its graph and the arrays of arguments were a third of an iteration, on
one core while the others waited. Every number is computed by the operation that computes it there, so that weights,
optimiser and metrics have the same bits; where it can't be done so, `LLMDPD` does it its own way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from llmdpd.diffusion import NoiseMLP
from llmdpd.methods.batch import PromptedBatch, cloned_actions
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.methods.llmdpd.steps import Steps, can_step
from llmdpd.nn.context import RetrievalContext
from llmdpd.nn.context.prepared import PreparedReading, ReadingSizes
from llmdpd.ops import layers, native, together
from llmdpd.ops.nodes import Weights, parameters
from llmdpd.ops.noise_net import WEIGHTS
from llmdpd.ops.parted import PreparedStep, clipped_step, steps_by_parts
from llmdpd.ops.together import Prepared, prepared_for, run_together, show_gradients
from llmdpd.ops.unchanged import Unchanged, same_objects
from llmdpd.utils import ranks, sharding

if TYPE_CHECKING:
    from llmdpd.methods.llmdpd.method import LLMDPD

_KEPT = 4  # shapes of batches: demonstrations are padded to the longest of each batch


class Cloning:
    """What a learner has prepared of its iterations, for the last shapes of batches."""

    def __init__(self) -> None:
        self._parts: _Parts | None = None
        self._iterations: dict[tuple[int, ...], Iteration] = {}

    def __deepcopy__(self, memo: Any) -> Cloning:
        return Cloning()  # a learner's copy prepares its own

    def prepared(self, learner: LLMDPD, batch: PromptedBatch) -> Iteration | None:
        """The iteration on batches of this shape, for this one to be run; None where it can't be prepared."""
        if not _possible(learner, batch):
            return None
        if self._parts is None or not self._parts.current(learner):
            self._iterations, self._parts = {}, _parts_of(learner)
        if self._parts is None:
            return None
        assert batch.tokens is not None, "possible"
        shape = (*batch.tokens.mask.shape, len(batch.observations))
        iteration = self._iterations.pop(shape, None)
        if iteration is None:
            iteration = Iteration(learner, self._parts, shape)
            for oldest in list(self._iterations)[: 1 - _KEPT]:
                del self._iterations[oldest]
        self._iterations[shape] = iteration
        return iteration


def _possible(learner: LLMDPD, batch: PromptedBatch) -> bool:
    """Whether the batch is one that the C++ code reads, in a state of torch in which it may."""
    policy, tokens = learner.policy, batch.tokens
    context, config = policy.context, policy.config
    if learner.config.eta or tokens is None or config.chunk > 1:
        return False
    if type(policy) is not DiffusionPolicy or type(context) is not RetrievalContext or type(policy.net) is not NoiseMLP:
        return False
    if not policy.training:  # as it learns
        policy.train()
    given = [batch.observations, cloned_actions(batch, learner.config.clone), tokens.states, tokens.actions]
    if context.text_head is not None:
        if batch.text is None:
            return False
        given.append(batch.text)
    rows = len(batch.observations)
    return (
        context.takes(tokens, rows)
        and len(policy.alpha_bar) <= rows
        and layers.computes(*given)
        and not any(part.requires_grad for part in given)
        and torch.is_grad_enabled()
        and torch.get_default_dtype() is torch.float32
    )


class _Parts(NamedTuple):
    """What iterations on batches of any shape are made of."""

    unchanged: Unchanged
    kind: tuple[Any, ...]
    context: tuple[Weights, Weights]
    net: Weights
    step: Steps
    made: tuple[object, ...]

    def current(self, learner: LLMDPD) -> bool:
        """Whether the learner is still as it was."""
        return self.kind == prepared_for() and same_objects(learner.made_of, self.made) and self.unchanged.holds()


def _parts_of(learner: LLMDPD) -> _Parts | None:
    """None where a network has parts or hooks that the C++ code doesn't know, or the optimiser steps otherwise."""
    policy, optimizer = learner.policy, learner.optimizers["policy_optimizer"]
    assert isinstance(policy.context, RetrievalContext), "possible"
    if not can_step(optimizer, policy):
        return None
    context, net = policy.context.weights_natively(), parameters(policy.net, WEIGHTS)
    if context is None or net is None:
        return None
    pairs = [pair for weights in (*context, net) for pair in zip(weights.values(), weights.arrays, strict=True)]
    if {id(parameter) for parameter, _ in pairs} != {*map(id, policy.parameters())}:
        return None
    average = [*learner.ema_policy.parameters()]
    plain = all(tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() for tensor in average)
    if not plain or not all(array.ctypes.data == p.data_ptr() for p, array in pairs):
        return None
    step = Steps([learner], "policy")
    unchanged = Unchanged([(policy, optimizer)], [learner.ema_policy])
    if not unchanged.holds():
        return None
    return _Parts(unchanged, prepared_for(), context, net, step, learner.made_of)


class Iteration:
    """An iteration on batches of one shape: P prompts of T steps, B states."""

    def __init__(self, learner: LLMDPD, parts: _Parts, shape: tuple[int, ...]) -> None:
        policy, (prompts, steps, rows) = learner.policy, shape
        context, net, A = policy.context, policy.net, policy.action_dim
        assert isinstance(context, RetrievalContext)
        self._clone, self._step, self._policy = learner.config.clone, parts.step, policy
        text = policy.embedding_dim if context.text_head is not None else 0
        sizes = ReadingSizes(prompts, steps, rows, text, context.prompt_dim, context.state_dim)
        self._reading = reading = PreparedReading(context.inputs(), parts.context, sizes)
        noisy, noise, predicted, d_predicted = (torch.zeros(rows, A, dtype=torch.float32) for _ in range(4))
        self._noise, self._predicted = noise, predicted
        self._noisy, self._d_predicted = native.array(noisy), native.array(d_predicted)
        self._timesteps = torch.zeros(rows, dtype=torch.int64)
        self._factor = np.float32(2.0 / predicted.numel())
        bf16 = learner.config.precision == "bf16"
        condition = [reading.condition, reading.pooled]
        levels = len(policy.alpha_bar)
        predicts = together.prediction(noisy, self._timesteps, levels, condition, parts.net, net, bf16)
        d_condition, d_pooled, *d_net = predicts.each_gradient()
        self._gradients: dict[Tensor, Tensor] = {
            **reading.gradients,
            **dict(zip(parts.net.values(), d_net, strict=True)),
        }
        self._forward = calls = Prepared()
        reading.forward(calls)
        calls.forward(predicts, predicted)
        self._backward = calls = Prepared()
        calls.backward(predicts, d_predicted)
        reading.backward(calls, d_condition, d_pooled)
        self._steps, self._rate = (Prepared(), Prepared()), np.ones(1)  # where the average stays, and where it follows
        self._average, self._weights = [*learner.ema_policy.parameters()], parts.step.weights[0]
        gradients = [self._gradients[p] for p in self._weights]
        parts.step.prepare(0, self._steps[0], gradients)
        parts.step.prepare(0, self._steps[1], gradients, self._average, self._rate)
        self._optimizer, self._bound = learner.optimizers["policy_optimizer"], learner.config.grad_clip
        self._by_parts: PreparedStep | None = None

    @torch.no_grad()
    def backward(self, batch: PromptedBatch) -> Tensor:
        """The loss and, as autograd would leave them, its gradients; of the own rows, where processes share a batch."""
        assert batch.tokens is not None
        self._reading.write(batch.text, batch.tokens, batch.keep, batch.observations, batch.timesteps)
        self._sample(batch)
        run_together([self._forward])
        loss = F.mse_loss(self._predicted, self._noise)
        np.subtract(self._predicted.numpy(), self._noise.numpy(), out=self._d_predicted)
        np.multiply(self._d_predicted, self._factor, out=self._d_predicted)
        if sharding.is_shared():  # as `sharding.backward`
            np.multiply(self._d_predicted, np.float32(1 / ranks.count()), out=self._d_predicted)
        run_together([self._backward])
        if self._by_parts is None:
            show_gradients(self._gradients.items())
        return loss

    def step(self, rate: float | None) -> Tensor:
        """AdamW's step down those gradients, and the EMA's of this rate; the norm of the gradients."""
        self._step.count()
        self._rate[0] = rate or 0.0
        run_together([self._steps[rate is not None]])
        increment_version(self._weights if rate is None else self._weights + self._average)
        return self._step.norm[0, 0].clone()

    def step_by_parts(self) -> Tensor:
        """As `step` without the EMA's, where processes share a batch (`llmdpd.ops.parted`)."""
        if self._by_parts is None:
            if not steps_by_parts(self._optimizer):  # before weights lie in shared memory
                return clipped_step([self._optimizer], self._bound)
            self._by_parts = PreparedStep(self._optimizer, [self._gradients[p] for p in self._weights], self._bound)
            for parameter in self._weights:  # none is shown from here on: it would be a part of a sum
                parameter.grad = None
        self._step.count()
        return self._by_parts.run()

    def _sample(self, batch: PromptedBatch) -> None:
        """Equation 5's noise and diffusion steps, in the order in which `diffusion_loss` samples them."""
        alpha_bar, device = self._policy.alpha_bar, self._noise.device
        self._timesteps.copy_(sharding.randint(len(alpha_bar), self._timesteps.shape, device))
        self._noise.copy_(sharding.randn(self._noise.shape, device))
        level, noise = alpha_bar[self._timesteps, None], self._noise.numpy()
        # torch's roots, whose last bit is not always NumPy's.
        clean = native.array(cloned_actions(batch, self._clone))
        np.multiply(level.sqrt().numpy(), clean, out=self._noisy)
        self._noisy += (1 - level).sqrt().numpy() * noise
