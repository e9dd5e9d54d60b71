"""An iteration of Algorithm 1 without prompts on a CUDA device, of one learner or of several at once.

It is `LLMDPD.learn` written out, as `stack` is for the CPU: every launch serves all learners, and few launches make an
iteration, which a CUDA graph then replays. Weights, gradients, moments and averages of all learners lie in one tensor
each, of which the networks' own are views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llmdpd.methods.batch import PromptedBatch, cloned_actions
from llmdpd.methods.llmdpd.method import LLMDPD, as_defined
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.methods.llmdpd.stack import of_own_parts
from llmdpd.methods.llmdpd.steps import can_step
from llmdpd.methods.optimisation import ema_rate
from llmdpd.methods.stacked import of_each, side_by_side
from llmdpd.nn.context.base import PooledContext
from llmdpd.ops import triton
from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.optimizer import MOMENTS, state_of
from llmdpd.ops.unchanged import hooks_of
from llmdpd.utils.stacked_tensors import StackedTensors, stack_parameters

if TYPE_CHECKING:
    from llmdpd.diffusion.noise_mlp import SinusoidalTime

_CRITIC = ("loss/critic", "q/mean", "q/target")
_ACTOR = ("loss/actor", "loss/diffusion", "reward/objective")
# What the kernels hold in registers, and one program does one after another.
_MOST_TIME, _MOST_LEVELS = 32, 16


def stackable_on_device(learners: Sequence[LLMDPD]) -> bool:
    """Whether these learners, of one configuration, can be stacked: critics are learned, and no prompt is read."""
    return (
        all(as_defined(learner) and of_own_parts(learner) for learner in learners)
        and bool(learners[0].config.eta)
        and type(learners[0].policy.context) is PooledContext
        and learners[0].policy.context.prompt_dim == 0
        and triton.unavailable() is None
        and all(t.is_cuda for learner in learners for t in _tensors(learner))
        and of_one_form(learners)
    )


def of_one_form(learners: Sequence[LLMDPD]) -> bool:
    """Whether the kernels compute what these learners do, all of them alike.

    Weights are float32, learned, and without hooks; sizes within what the kernels take; features of a state the same.
    """
    from llmdpd.kernels.weight_gradients import FEW_ROWS

    policy, config = learners[0].policy, learners[0].config
    networks = [network for learner in learners for network in (learner.policy, learner.ema_policy)]
    own, *others = ([*network.context.features.buffers()] for network in networks)
    parts = [part for learner in learners for module in learner.modules.values() for part in module.modules()]
    return (
        config.batch_size <= FEW_ROWS
        and policy.net.time_dim <= _MOST_TIME
        and max(len(policy.alpha_bar), policy.training_sampler.steps) <= _MOST_LEVELS
        and policy.action_dim <= min(policy.net.hidden_dim, learners[0].critic.hidden_dim)
        and not any(hooks_of(parts))
        and all(can_step(learner.optimizers["policy_optimizer"], learner.policy) for learner in learners)
        and all(can_step(learner.optimizers["critic_optimizer"], learner.critic) for learner in learners)
        and all(t.dtype is torch.float32 and t.is_contiguous() for learner in learners for t in _tensors(learner))
        and all(p.requires_grad for learner in learners for p in learner.policy.parameters())
        and all(torch.equal(a, b) for other in others for a, b in zip(own, other, strict=True))
    )


def _tensors(learner: LLMDPD) -> list[Tensor]:
    return [t for module in learner.modules.values() for t in module.state_dict().values()]


class DeviceStack:
    """Learners that do their iterations at once.

    They stay whole: their networks and optimisers are written in place. Their weights are put side by side at the first
    iteration, and again whenever something of theirs is no longer where it was put, as after loading a checkpoint.
    """

    def __init__(self, learners: Sequence[LLMDPD]) -> None:
        self.learners = list(learners)
        self._memory: _Memory | None = None

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a learner's copy is in no stack

    @property
    def in_place(self) -> bool:
        """Whether the learners' weights and optimisers are where the stack has put them, and all weights learn."""
        return self._memory is not None and self._memory.in_place

    def schedule(self, iteration: int) -> None:
        """See `Method.schedule`."""
        for learner in self.learners:
            learner.schedule(iteration)

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """See `Method.follow`."""
        rate = ema_rate(self.learners[0].config, iteration)
        if rate is not None:
            memory = self._placed()
            memory.average.flat.lerp_(memory.policy.weights.flat, rate)
            increment_version(memory.parameters)

    def update(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator | None]
    ) -> list[dict[str, Tensor]]:
        """One iteration of each on its batch, sampling by its generator; their metrics as of `LLMDPD.learn`."""
        self.schedule(iteration)
        metrics = self.learn(side_by_side(batches), generators)
        self.follow(iteration)
        return of_each(metrics)

    def with_generators(self, generators: Sequence[torch.Generator]) -> WithGenerators:
        """The stack for those who know nothing of generators."""
        return WithGenerators(self, generators)

    @torch.no_grad()
    def learn(self, batch: PromptedBatch, generators: Sequence[torch.Generator | None]) -> dict[str, Tensor]:
        """The device's work of an iteration, see `LLMDPD.learn`.

        Args:
            batch: the learners' batches side by side, each tensor [L, B, …].
            generators: which each samples by, of the device; None: torch's own.

        Returns:
            Metrics [L].
        """
        memory = self._placed()
        with triton.on_device(batch.rewards.device):
            found = _Iteration(memory, batch, generators).run()
        increment_version(memory.parameters)
        return found

    def _placed(self) -> _Memory:
        """What the kernels read and write, as the learners have it."""
        if self._memory is None or not self._memory.in_place:
            self._memory = _Memory(self.learners)
        return self._memory


@dataclass(frozen=True)
class WithGenerators:
    """A stack whose learners sample by these generators, as what is captured in a CUDA graph (`Graphed`)."""

    stack: DeviceStack
    generators: Sequence[torch.Generator]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every learner's, by its number and name."""
        learners = enumerate(self.stack.learners)
        return {f"{number}/{name}": m for number, learner in learners for name, m in learner.modules.items()}

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Every learner's, by its number and name."""
        learners = enumerate(self.stack.learners)
        return {f"{number}/{name}": o for number, learner in learners for name, o in learner.optimizers.items()}

    def schedule(self, iteration: int) -> None:
        """See `Method.schedule`."""
        self.stack.schedule(iteration)

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """See `DeviceStack.learn`."""
        return self.stack.learn(batch, self.generators)

    def follow(self, iteration: int) -> None:
        """See `Method.follow`."""
        self.stack.follow(iteration)


class _Memory:
    """The weights of all learners side by side, and what belongs to them."""

    def __init__(self, learners: Sequence[LLMDPD]) -> None:
        self.learners, first = learners, learners[0]
        self.config, self.network = first.config, first.policy
        self.policy, self.critics = (_Optimised(learners, name) for name in ("policy", "critic"))
        self.average = stack_parameters(self._of_averages)
        self.targets = stack_parameters(self._of_targets)
        self.by_chain = self.policy.weights.like()  # the gradients of the policy that come through its actions
        self.chain = _Chain(self.network)
        self.parameters = [p for learner in learners for m in learner.modules.values() for p in m.parameters()]
        for learner in learners:
            learner.policy.train()

    @property
    def _of_averages(self) -> list[list[nn.Parameter]]:
        return [list(learner.ema_policy.parameters()) for learner in self.learners]

    @property
    def _of_targets(self) -> list[list[nn.Parameter]]:
        return [list(learner.target_critic.parameters()) for learner in self.learners]

    @property
    def in_place(self) -> bool:
        """See `DeviceStack.in_place`."""
        return (
            self.policy.in_place
            and self.critics.in_place
            and self.average.holds(self._of_averages)
            and self.targets.holds(self._of_targets)
        )


class _Optimised:
    """The weights of one optimiser of each learner, side by side, with their gradients and AdamW's state."""

    def __init__(self, learners: Sequence[LLMDPD], name: str) -> None:
        from llmdpd.kernels.updates import AdamW

        self._optimizers = [learner.optimizers[f"{name}_optimizer"] for learner in learners]
        self.weights = stack_parameters(self._parameters)
        self.gradients = self.weights.like()
        states = self._states
        self._moments = {key: StackedTensors([[state[key] for state in own] for own in states]) for key in MOMENTS}
        self._counts = torch.stack([torch.stack([state["step"] for state in own]) for own in states])
        for row, own in enumerate(states):
            for number, state in enumerate(own):
                state["step"] = self._counts[row, number]
                state |= {key: moments.views[number][row] for key, moments in self._moments.items()}
        group = self._optimizers[0].param_groups[0]
        self._lr: Tensor = group["lr"]
        limit = learners[0].config.grad_clip
        self._settings = AdamW(tuple(group["betas"]), group["eps"], group["weight_decay"], limit)

    @property
    def _parameters(self) -> list[list[nn.Parameter]]:
        return [list(optimizer.param_groups[0]["params"]) for optimizer in self._optimizers]

    @property
    def _states(self) -> list[list[dict[str, Any]]]:
        pairs = zip(self._optimizers, self._parameters, strict=True)
        return [[state_of(optimizer, parameter) for parameter in own] for optimizer, own in pairs]

    @property
    def in_place(self) -> bool:
        """Whether the learners' own are still views of what lies here, and learn by the rate that is read."""
        states, parameters = self._states, self._parameters
        kept = all(of.holds([[state[key] for state in own] for own in states]) for key, of in self._moments.items())
        counted = states[0][0]["step"].data_ptr() == self._counts.data_ptr()
        same_rate = self._optimizers[0].param_groups[0]["lr"] is self._lr
        learned = all(parameter.requires_grad for own in parameters for parameter in own)
        return kept and counted and same_rate and learned and self.weights.holds(parameters)

    def step(self, average: tuple[Tensor, float] | None = None) -> Tensor:
        """A step of all learners by the gradients; see `kernels.updates.step`."""
        from llmdpd.kernels import updates

        self._counts += 1
        moments = (self._moments[MOMENTS[0]].flat, self._moments[MOMENTS[1]].flat)
        given = (self.weights.flat, self.gradients.flat, moments, self._counts, self._lr, self._settings)
        return updates.step(*given, average).run()


class _Chain:
    """What is the same of every learner's chain and diffusion loss, on their device."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.plan, levels = policy.training_sampler, range(len(policy.alpha_bar))
        # The chain's steps in their order, and then the levels of the diffusion loss that are none of them.
        rows = [int(step) for step in self.plan.timesteps]
        rows += [level for level in levels if level not in rows]
        self.table = torch.from_numpy(self.plan.table()).to(policy.device)
        self.waves = cast("SinusoidalTime", policy.net.time_mlp[0])(torch.tensor(rows, device=policy.device))
        self.places = torch.tensor([rows.index(level) for level in levels], device=policy.device)


class _Network:
    """The noise network's weights of all learners [L, …], or their gradients, by what reads them."""

    def __init__(self, policy: DiffusionPolicy, of: StackedTensors) -> None:
        names = {id(parameter): name for name, parameter in policy.net.named_parameters()}
        order = [names[id(parameter)] for parameter in policy.parameters()]
        by_name, net = dict(zip(order, of.views, strict=True)), policy.net
        self.time = [by_name[f"time_mlp.{place}"] for place in ("1.weight", "1.bias", "3.weight", "3.bias")]
        self.layers = [by_name[f"layers.{number}.{part}"] for number in range(4) for part in ("weight", "bias")]
        self.W_a, self.W_t, self.W_s = self.layers[0].split([net.action_dim, net.time_dim, net.state_dim], dim=2)


class _Iteration:
    """The work of one iteration: batches of B rows of L learners, and their random numbers."""

    def __init__(self, stack: _Memory, batch: PromptedBatch, by: Sequence[torch.Generator | None]) -> None:
        features, config = stack.network.context.features, stack.config
        self.stack, self.config, self.bf16 = stack, config, config.precision == "bf16"
        # The kernels read all of it as it lies in memory; a sampler's batches are so already.
        clean = cloned_actions(batch, config.clone)
        self.clean, self.actions, self.rewards, self.terminals = (
            part.float().contiguous() for part in (clean, batch.actions, batch.rewards, batch.terminals)
        )
        observed = (batch.observations, batch.next_observations)
        self.state, self.following = (features(part.float()).contiguous() for part in observed)
        shape, new = self.rewards.shape, self.rewards.new_empty
        self.next_key, self.key = (new(len(by), dtype=torch.int64) for _ in range(2))
        self.levels, self.noise, self.choice = new(shape, dtype=torch.int64), torch.empty_like(self.clean), new(len(by))
        # In the order in which `LLMDPD.learn` samples.
        for number, generator in enumerate(by):
            self.next_key[number].random_(0, 2**63 - 1, generator=generator)
            self.levels[number].random_(0, len(stack.network.alpha_bar), generator=generator)
            self.noise[number].normal_(generator=generator)
            self.key[number].random_(0, 2**63 - 1, generator=generator)
            self.choice[number].uniform_(generator=generator)

    def run(self) -> dict[str, Tensor]:
        """Do it; metrics [L]."""
        stack = self.stack
        metrics = dict(zip(_CRITIC, self._learn_critics().unbind(1), strict=True))
        metrics["grad/critic"] = stack.critics.step((stack.targets.flat, self.config.tau))
        metrics |= zip(_ACTOR, self._learn_policy().unbind(1), strict=True)
        metrics["grad/policy"] = stack.policy.step()
        return metrics

    def _learn_critics(self) -> Tensor:
        """Equation 6: the critics' gradients; metrics [L, 3]."""
        from llmdpd.kernels import learners, losses, mish_mlp
        from llmdpd.kernels.members import Members

        stack, config = self.stack, self.config
        average = _Network(stack.network, stack.average)
        chain = self._arguments(average, self._time_rows(average)[1], self.following, self.next_key)
        actions = learners.forward(chain, False)[0][:, :, 0]
        targets, critics = (Members.stacked(of.halves()) for of in (stack.targets, stack.critics.weights))
        next_values = mish_mlp.forward(torch.cat([self.following, actions], 2), targets, self.bf16)[0]
        seen = torch.cat([self.state, self.actions], 2)
        values, packed = mish_mlp.forward(seen, critics, self.bf16)
        given = (values, next_values, self.rewards, self.terminals, config.reward_scale, config.gamma)
        launch, d_values, metrics = losses.regression(*given)
        launch.run()
        mish_mlp.backward_into(d_values, seen, critics, packed, self.bf16, False, stack.critics.gradients.halves())
        return metrics

    def _learn_policy(self) -> Tensor:
        """Equation 8: the policy's gradients; metrics [L, 3]."""
        from llmdpd.kernels import learners, losses, mish_mlp, time_rows
        from llmdpd.kernels.members import Members

        stack, net, state = self.stack, _Network(self.stack.network, self.stack.policy.weights), self.state
        embedded, rows = self._time_rows(net)
        places, alpha_bar = stack.chain.places, stack.network.alpha_bar
        launch, noisy = time_rows.noisy_inputs(self.clean, self.noise, self.levels, places, alpha_bar, embedded, state)
        launch.run()
        layers, critics = Members.stacked(net.layers), Members.stacked(stack.critics.weights.halves())
        predicted, packed = mish_mlp.forward(noisy, layers, self.bf16)
        chain = self._arguments(net, rows, state, self.key)
        actions, tape, of_chain = learners.forward(chain, True)
        seen = torch.cat([state, actions[:, :, 0]], 2)
        values, of_critics = mish_mlp.forward(seen, critics, self.bf16)
        launch, d_predicted, d_values, metrics = losses.actor(
            predicted, self.noise, values, self.choice, self.config.eta
        )
        launch.run()
        d_seen, _ = mish_mlp.backward_into(d_values, seen, critics, of_critics, self.bf16, True, [])
        assert d_seen is not None, "asked for"

        gradients, by_chain = (_Network(stack.network, of) for of in (stack.policy.gradients, stack.by_chain))
        _, slopes = mish_mlp.backward_into(d_predicted, noisy, layers, packed, self.bf16, False, gradients.layers)
        d_tau = torch.empty_like(chain.tau)
        into = learners.Gradients(by_chain.W_s, by_chain.layers[1], d_tau, by_chain.W_a, by_chain.layers[2:])
        learners.backward(d_seen[:, :, None, state.shape[2] :], chain, tape, of_chain, into)
        self._learn_times(net, embedded, d_tau, slopes)
        stack.policy.gradients.flat.add_(stack.by_chain.flat)
        return metrics

    def _learn_times(self, net: _Network, embedded: Tensor, d_tau: Tensor, slopes: Tensor) -> None:
        """The gradients of the time embedding, and of W_t what comes through the chain.

        d_tau: of the chain's time rows [L, K, H]. slopes: of the first layer in the diffusion loss [L, B or more, ·].
        """
        from llmdpd.kernels import time_rows

        stack, chain = self.stack, self.stack.chain
        launch, sums = time_rows.level_sums(slopes, self.levels, chain.places, len(chain.waves), d_tau.shape[2])
        launch.run()
        if len(chain.waves) > d_tau.shape[1]:
            d_tau = F.pad(d_tau, (0, 0, 0, len(chain.waves) - d_tau.shape[1]))
        own, by_chain = (_Network(stack.network, of) for of in (stack.policy.gradients, stack.by_chain))
        into = [*own.time, by_chain.W_t]
        time_rows.backward(chain.waves, net.time, net.W_t, embedded, (d_tau, sums), into).run()

    def _time_rows(self, net: _Network) -> tuple[Tensor, Tensor]:
        """The time embedding [L, R, T] of the chain's rows, and W_t times it [L, R, H]."""
        from llmdpd.kernels import time_rows

        launch, embedded, rows = time_rows.forward(self.stack.chain.waves, net.time, net.W_t)
        launch.run()
        return embedded, rows

    def _arguments(self, net: _Network, rows: Tensor, state: Tensor, key: Tensor) -> ChainArguments:
        """Of the chains: every part but the table with a leading dimension of learners."""
        chain = self.stack.chain
        tau, (_, b1, *trunk) = rows[:, : chain.plan.steps].contiguous(), net.layers
        constants = (chain.plan.start, chain.plan.bound, 1, self.bf16)
        return ChainArguments(state, net.W_s, b1, tau, net.W_a, trunk, chain.table, key, None, *constants)
