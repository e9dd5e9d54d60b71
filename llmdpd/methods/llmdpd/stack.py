"""An iteration of Algorithm 1 without prompts, of several learners that differ by their seed, at once.

It is `LLMDPD.learn` written out: what its losses differentiate by autograd is called here by name, for all learners
together. Where networks are small, most of an iteration is not their products but what calls them; that is done once
for all learners here, and each core has learners of its own in place of a part of each one's few rows. Every number is
computed by the operation that computes it alone, so that each learner has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llmdpd.diffusion import NoiseMLP
from llmdpd.methods.batch import PromptedBatch, cloned_actions
from llmdpd.methods.llmdpd.method import LLMDPD, as_defined
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.methods.llmdpd.steps import Steps
from llmdpd.methods.optimisation import ema_rate
from llmdpd.nn.context.base import PooledContext
from llmdpd.nn.critic import DoubleQ, layers_of
from llmdpd.ops import native, together
from llmdpd.ops.arguments import MlpArguments
from llmdpd.ops.nodes import parameters
from llmdpd.ops.noise_net import WEIGHTS
from llmdpd.ops.packing import bind_sampler, pack_net
from llmdpd.ops.together import Prepared, net_of, run_together, tapes_of
from llmdpd.utils.device import matmul_precision

_NONE = np.empty(0, np.float32)


def stackable(learners: Sequence[LLMDPD]) -> bool:
    """Whether these learners, of one configuration, can be stacked: critics are learned, and no prompt is read."""
    first, policy = learners[0], learners[0].policy
    tensors = [t for learner in learners for module in learner.modules.values() for t in module.state_dict().values()]
    return (
        all(as_defined(learner) and of_own_parts(learner) for learner in learners)
        and bool(first.config.eta)
        and type(policy.context) is PooledContext
        and policy.context.prompt_dim == 0
        and native.available()[0]
        and all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
        and all(p.requires_grad for learner in learners for p in learner.policy.parameters())
        and all(parameters(learner.policy.net, WEIGHTS) is not None for learner in learners)
    )


def of_own_parts(learner: LLMDPD) -> bool:
    """Whether policy, noise network and critics are of the classes that a stack computes."""
    policy, critics = learner.policy, (learner.critic, learner.target_critic)
    return (
        type(policy) is DiffusionPolicy
        and type(policy.net) is NoiseMLP
        and all(type(critic) is DoubleQ for critic in critics)
    )


class Stack:
    """Learners that do their iterations at once.

    They stay whole: their networks and optimisers are written in place. While there is a stack nobody may put other
    tensors in the place of theirs, as loading a checkpoint does with an optimiser's.
    """

    def __init__(self, learners: Sequence[LLMDPD]) -> None:
        self._learners = list(learners)
        self._iteration: _Iteration | None = None
        for learner in learners:
            learner.policy.train()

    def update(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator]
    ) -> list[dict[str, Tensor]]:
        """One iteration of each on its batch, drawing by its generator; their metrics as of `LLMDPD.learn`."""
        prepared = self.prepare(len(batches[0].rewards))
        with matmul_precision(self._learners[0].config.precision):
            return prepared.run(batches, iteration, generators)

    def prepare(self, rows: int) -> _Iteration:
        """The iteration on batches of so many rows, as the next `update` would prepare it."""
        if self._iteration is None or self._iteration.rows != rows:
            self._iteration = _Iteration(self._learners, rows)
        return self._iteration

    def gradients(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """A learner's weights, and the memory that the prepared iteration writes their gradients to."""
        assert self._iteration is not None, "prepared"
        return self._iteration.lanes[number].gradients


class _Iteration:
    """Buffers for batches of B rows of L learners, and the calls of an iteration on them.

    Buffers are [L, B, …], the critics' [2, L, B, …].
    """

    def __init__(self, learners: Sequence[LLMDPD], rows: int) -> None:
        self.learners, self.rows, self.config = learners, rows, learners[0].config
        policy, each = learners[0].policy, (len(learners), rows)
        S, A = policy.context.state_dim, policy.action_dim
        self.S, self.A, self.alpha_bar, zeros = S, A, policy.alpha_bar, torch.zeros
        self.states, self.next_states = zeros(*each, S), zeros(*each, S)
        # Of the diffusion loss.
        self.timesteps, self.noise, self.noisy = zeros(each, dtype=torch.int64), zeros(*each, A), zeros(*each, A)
        self.predicted, self.d_predicted = zeros(*each, A), zeros(*each, A)
        # Of the chains: the average's in the next states, and the policy's.
        self.next_key, self.key = (zeros(len(learners), 1, dtype=torch.int64) for _ in range(2))
        self.next_actions, self.actions, self.d_actions = zeros(*each, A), zeros(*each, 1, A), zeros(*each, 1, A)
        # Of the critics: the targets' in the next states, theirs on the batch, and theirs on the policy's actions.
        self.next_x, self.x, self.policy_x, self.d_policy_x = (zeros(*each, S + A) for _ in range(4))
        self.next_q, self.q, self.d_q, self.policy_q = (zeros(2, *each, 1) for _ in range(4))
        self.d_policy_q = zeros(*each, 1)
        self.critic_step, self.policy_step = (Steps(learners, name) for name in ("critic", "policy"))
        self.tau_rate, self.ema_rate = np.array([self.config.tau]), np.ones(1)
        self.lanes = [_Lane(self, number) for number in range(len(learners))]
        self._weights = [p for learner in learners for module in learner.modules.values() for p in module.parameters()]

    @torch.no_grad()
    def run(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator]
    ) -> list[dict[str, Tensor]]:
        """See `Stack.update`."""
        lanes, rate = self.lanes, ema_rate(self.config, iteration)
        self.learners[0].schedule(iteration)
        rewards, terminals = self._take(batches)
        chosen = self._draw(batches, generators)
        run_together([lane.on_the_batch for lane in lanes])
        self.next_x[..., self.S :] = self.next_actions
        run_together([lane.next_values for lane in lanes])
        critic = self._critic_loss(rewards, terminals)
        self.critic_step.count()
        run_together([lane.critic_step for lane in lanes])
        self.policy_x[..., self.S :] = self.actions[:, :, 0]
        run_together([lane.policy_values[choice] for lane, choice in zip(lanes, chosen, strict=True)])
        actor = self._actor_loss(chosen)
        self.policy_step.count()
        self.ema_rate[0] = 0.0 if rate is None else rate
        run_together([lane.policy_step[choice, rate is None] for lane, choice in zip(lanes, chosen, strict=True)])
        increment_version(self._weights)
        if rate is not None:
            for lane in lanes:
                lane.sample_by_average()
        of_critic, of_policy = (steps.norm[:, 0].clone().unbind() for steps in (self.critic_step, self.policy_step))
        return [
            {**critic[number], "grad/critic": of_critic[number], **actor[number], "grad/policy": of_policy[number]}
            for number in range(len(lanes))
        ]

    def _take(self, batches: Sequence[PromptedBatch]) -> tuple[Tensor, Tensor]:
        """Fill in what the batches give; rewards and terminals [L, B]."""
        for number, (learner, batch) in enumerate(zip(self.learners, batches, strict=True)):
            features = learner.policy.context.features
            self.states[number] = features(batch.observations)
            self.next_states[number] = learner.ema_policy.context.features(batch.next_observations)
            self.next_x[number, :, : self.S] = features(batch.next_observations)
            self.x[number, :, self.S :] = batch.actions
        for x in (self.x, self.policy_x):
            x[..., : self.S] = self.states
        return torch.stack([batch.rewards for batch in batches]), torch.stack([batch.terminals for batch in batches])

    def _draw(self, batches: Sequence[PromptedBatch], generators: Sequence[torch.Generator]) -> list[int]:
        """Draw all random numbers of the iteration, and make the noisy actions; which critic is chosen of each."""
        chosen = []
        for number, by in enumerate(generators):
            self.next_key[number].random_(0, 2**63 - 1, generator=by)
            self.timesteps[number].random_(0, len(self.alpha_bar), generator=by)
            self.noise[number].normal_(generator=by)
            self.key[number].random_(0, 2**63 - 1, generator=by)
            chosen.append(0 if bool(torch.rand((), generator=by) < 0.5) else 1)
        clean = torch.stack([cloned_actions(batch, self.config.clone) for batch in batches])
        level = self.alpha_bar[self.timesteps][..., None]
        self.noisy.copy_(level.sqrt() * clean + (1 - level).sqrt() * self.noise)
        return chosen

    def _critic_loss(self, rewards: Tensor, terminals: Tensor) -> list[dict[str, Tensor]]:
        """Equation 6 of each: its gradient by the values, and the metrics."""
        config = self.config
        next_value = torch.minimum(self.next_q[0], self.next_q[1])[..., 0]
        target = rewards * config.reward_scale + config.gamma * (1 - terminals) * next_value
        q1, q2 = self.q[..., 0]
        self.d_q[..., 0] = (self.q[..., 0] - target) * (2 / self.rows)
        return [
            {
                "loss/critic": F.mse_loss(q1[n], target[n]) + F.mse_loss(q2[n], target[n]),
                "q/mean": q1[n].mean(),
                "q/target": target[n].mean(),
            }
            for n in range(len(self.learners))
        ]

    def _actor_loss(self, chosen: Sequence[int]) -> list[dict[str, Tensor]]:
        """Equation 8 of each: its gradients by noise and values, and the metrics."""
        self.d_predicted.copy_((self.predicted - self.noise) * (2 / (self.rows * self.A)))
        metrics = []
        for number, choice in enumerate(chosen):
            diffusion = F.mse_loss(self.predicted[number], self.noise[number])
            objective = self.policy_q[choice, number, :, 0].mean()
            scale = self.policy_q[1 - choice, number, :, 0].abs().mean()
            weight = self.config.eta / scale.clamp_min(1e-6)
            self.d_policy_q[number] = -weight / self.rows
            loss = diffusion - weight * objective
            metrics.append({"loss/actor": loss, "loss/diffusion": diffusion, "reward/objective": objective})
        return metrics


class _Lane:
    """One learner's part of an iteration: its calls, on its rows of the buffers."""

    def __init__(self, whole: _Iteration, number: int) -> None:
        self._whole, self._number, self._learner = whole, number, whole.learners[number]
        learner, config = self._learner, self._learner.config
        self._bf16 = bf16 = config.precision == "bf16"
        self._on_batch, on_policy, in_next = (
            _critics(critic, x[number], bf16)
            for critic, x in (
                (learner.critic, whole.x),
                (learner.critic, whole.policy_x),
                (learner.target_critic, whole.next_x),
            )
        )
        states, net = whole.states[number], learner.policy.net
        weights, plan = parameters(net, WEIGHTS), learner.policy.training_sampler
        assert weights is not None, "stackable"
        noisy = (whole.noisy[number], whole.timesteps[number], len(whole.alpha_bar))
        predicts = together.prediction(*noisy, [states], weights, net, bf16)
        samples = together.chain(plan, whole.key[number], whole.A, states, weights, net, bf16)
        self._tapes = tapes_of(self._on_batch)
        nets = [net_of(mlp) for mlp in on_policy]

        self.sample_by_average()
        self.next_values = Prepared()
        self.next_values.nets_forward([net_of(mlp) for mlp in in_next], whole.next_q[:, number].unbind(), [_NONE] * 2)
        self.critic_step = calls = Prepared()
        of_critics = whole.critic_step.gradients(number)
        grads = whole.d_q[:, number].unbind()
        calls.nets_backward(self._nets, grads, self._tapes, [], [of_critics[:8], of_critics[8:]])
        whole.critic_step.prepare(number, calls, of_critics)
        calls.forward(predicts, whole.predicted[number])
        calls.forward(samples, whole.actions[number])
        of_policy = _shaped(predicts.gradients[states.numel() :], whole.policy_step.weights[number])
        self.gradients = [
            *zip(whole.critic_step.weights[number], of_critics, strict=True),
            *zip(whole.policy_step.weights[number], of_policy, strict=True),
        ]
        self.policy_values = [Prepared(), Prepared()]
        # By which of the critics is chosen, whose gradient alone is needed, and by whether the average stays.
        self.policy_step: dict[tuple[int, bool], Prepared] = {}
        for choice in range(2):
            pair = [choice, 1 - choice]
            outs, d_x = [whole.policy_q[place, number] for place in pair], whole.d_policy_x[number]
            self.policy_values[choice].nets_forward([nets[place] for place in pair], outs, self._tapes)
            for stays in (False, True):
                calls = self.policy_step[choice, stays] = Prepared()
                calls.nets_backward([nets[choice]], [whole.d_policy_q[number]], self._tapes[:1], [d_x], [[]])
                calls.copy(whole.d_actions[number, :, 0], d_x[:, whole.S :])
                calls.backward(samples, whole.d_actions[number])
                calls.backward(predicts, whole.d_predicted[number])
                own, sampled = (node.gradients[states.numel() :] for node in (predicts, samples))
                calls.add(own[None], sampled[None])
                averages = ([], None) if stays else (_weights(learner.ema_policy), whole.ema_rate)
                whole.policy_step.prepare(number, calls, of_policy, *averages)
                calls.average(_weights(learner.target_critic), _weights(learner.critic), whole.tau_rate)

    def sample_by_average(self) -> None:
        """Take the average's weights, which act in the next states from here on."""
        whole, number, net = self._whole, self._number, self._learner.ema_policy.net
        sampler = bind_sampler(pack_net(net, self._bf16), net.time_mlp, self._learner.policy.training_sampler)
        self._nets = [net_of(mlp) for mlp in self._on_batch]
        self.on_the_batch = calls = Prepared()
        calls.sample(sampler, whole.next_states[number], whole.next_key[number], whole.next_actions[number])
        calls.nets_forward(self._nets, whole.q[:, number].unbind(), self._tapes)


def _critics(critic: DoubleQ, x: Tensor, bf16: bool) -> list[MlpArguments]:
    """The two critics on inputs [B, S + A]."""
    found = []
    for q in (critic.q1, critic.q2):
        weight, bias, rest = layers_of(q)
        trunk = [part.detach() for layer in rest for part in (layer.weight, layer.bias)]
        found.append(MlpArguments(x, weight.detach(), bias.detach(), trunk, bf16))
    return found


def _weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes that follow each other in one."""
    return [part.view(weight.shape) for part, weight in zip(flat.split([w.numel() for w in like]), like, strict=True)]
