"""Algorithm 1 of the paper: policy diffusion under prompts, with double Q-learning."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.diffusion import philox_normal, reverse_diffusion
from llmdpd.diffusion.schedules import Precision
from llmdpd.errors import InputError
from llmdpd.methods.base import CloningConfig, Method, Start
from llmdpd.methods.batch import PromptedBatch, StepWindows, cloned_actions
from llmdpd.methods.llmdpd.cloning import Cloning
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.methods.optimisation import ema_rate
from llmdpd.methods.stacked import Stacked, side_by_side
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition, EncodedPrompts
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops.parted import refuse_alone
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Fraction, NonNegative, Width
from llmdpd.utils.device import matmul_precision
from llmdpd.utils.sharding import randint, randn
from llmdpd.utils.tensors import load_tensors

if TYPE_CHECKING:
    from llmdpd.methods.llmdpd.alone import Alone
    from llmdpd.methods.llmdpd.device_stack import DeviceStack

_AS_PREPARED = (
    *("learn", "critic_loss", "actor_loss", "diffusion_loss", "reward_objective"),
    *("encode", "condition", "step", "track", "schedule", "follow", "frozen"),
    *("_sample", "_cloned", "_critic_prompt", "_lerp"),
)
"""What prepared and stacked iterations do in their own way: where one of them is overridden, none is."""


def as_defined(learner: LLMDPD) -> bool:
    """Whether the learner does in every step of an iteration what `LLMDPD` does."""
    return all(getattr(getattr(learner, name), "__func__", None) is own for name, own in _AS_WRITTEN.items())


@dataclass(frozen=True)
class LLMDPDConfig(CloningConfig):
    """Algorithm 1. Where the paper is silent the values are Diffusion-QL's, the framework that it builds on."""

    name = "llmdpd"
    legacy: ClassVar[Mapping[str, str]] = {"agent": "method."}

    network: DiffusionNetworkConfig = field(default_factory=DiffusionNetworkConfig)
    acting: BestOfN = field(default_factory=BestOfN)
    critic_lr: NonNegative = 3e-4
    """Learning rate of the critics."""
    gamma: Fraction = 0.99
    """Discount a step."""
    tau: Fraction = 0.005
    """Polyak rate of the target critics, an iteration."""
    eta: NonNegative = 1.0
    """Weight of the reward term: lambda = eta / mean |Q| (equation 8); 0 clones alone and trains no critic."""
    reward_scale: NonNegative = 1.0
    """Factor on rewards in the critics' targets."""
    critic_sees_prompts: bool = False
    """Condition the critics on the prompt vectors too; the paper's critics are Q(s, a)."""
    precision: Precision = "fp32"
    """Of the hidden layers' products in all three networks; encoders may follow. Weights, sums, optimisers: float32."""
    critic_hidden: Width = 256
    """Width of the critics' three hidden layers."""

    @classmethod
    def from_preset(cls, start: Start) -> LLMDPDConfig:
        own: LLMDPDConfig = start.diffusion
        return own

    @property
    def choosing_critic(self) -> bool:
        return self.eta != 0

    def check(self) -> None:
        super().check()
        check_chunk(self.network.chunk, self.eta)
        if self.acting.samples > 1 and not self.choosing_critic:
            raise InputError(
                "no critic to choose among samples by",
                field="acting.samples",
                found=self.acting.samples,
                expected="1 where no critics are trained, as with eta 0",
            )


class LLMDPD(Method[DiffusionPolicy, LLMDPDConfig]):
    """Policy, critics, their targets and optimisers, and one iteration of Algorithm 1.

    Args: see `Method`.

    Raises:
        InputError: a reward term for a policy with chunks (see `check_chunk`).
    """

    Config = LLMDPDConfig
    network_class = DiffusionPolicy

    def __init__(self, network: DiffusionPolicy, config: LLMDPDConfig, iterations: int) -> None:
        check_chunk(network.config.chunk, config.eta)
        super().__init__(network, config, iterations)
        prompt_dim = network.context.prompt_dim if config.critic_sees_prompts else 0
        self.critic = DoubleQ(network.context.state_dim, network.action_dim, prompt_dim, config.critic_hidden)
        self.critic.to(network.device)
        self.target_critic = self._add("critic", self.critic, config.critic_lr)
        self._cloning = Cloning()
        self._alone: Alone | None = None
        # On the CPU it costs nothing to read a random number, and saves the other critic's backward pass.
        self.choose_on_host = network.device.type == "cpu"
        self._on_device: DeviceStack | None = None

    @property
    def made_of(self) -> tuple[object, ...]:
        """What an iteration is prepared for, and somebody may put something else in the place of."""
        networks = (self.policy, self.ema_policy, self.critic, self.target_critic)
        return *networks, self.config, self.policy.training_sampler, *self.optimizers.values()

    @property
    def acting_critic(self) -> DoubleQ | None:
        return self.critic if self.config.choosing_critic else None

    @classmethod
    def stacked(cls, learners: Sequence[Any]) -> Stacked | None:
        if learners[0].policy.device.type == "cuda":
            from llmdpd.methods.llmdpd.device_stack import DeviceStack, stackable_on_device

            for learner in learners:
                learner._on_device = None
            return DeviceStack(learners) if stackable_on_device(learners) else None
        from llmdpd.methods.llmdpd.stack import Stack, stackable

        return Stack(learners) if stackable(learners) else None

    def take_over(self, critic: nn.Module | None, networks: Mapping[str, Tensor], path: Path) -> list[str]:
        """The critics of the policy folder, which has them where they were trained."""
        if self.acting_critic is None:
            return []
        if critic is None:
            return ["critic", "target_critic"]
        for module in (self.critic, self.target_critic):
            load_tensors(module, critic.state_dict(), path)
        return []

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        metrics = self._update_prepared(batch, iteration)
        return super().update(batch, iteration) if metrics is None else metrics

    def _update_prepared(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor] | None:
        """The same iteration, to the bit, by calls that were prepared; None where it is none of those that can be."""
        if not as_defined(self):
            return None
        if not sharding.is_shared():
            refuse_alone(self._of("policy"))
        if self.config.eta:
            if self._alone is None:
                from llmdpd.methods.llmdpd.alone import Alone  # which stands on this module

                self._alone = Alone()
            return self._alone.update(self, batch, iteration)
        prepared = self._cloning.prepared(self, batch)
        if prepared is None:
            return None
        self.schedule(iteration)
        loss = prepared.backward(batch)
        if sharding.is_shared():
            norm = prepared.step_by_parts()
            self.follow(iteration)
        else:
            norm = prepared.step(ema_rate(self.config, iteration))
        return {"loss/actor": loss, "loss/diffusion": loss, "grad/policy": norm}

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """Lines 5 to 12 of Algorithm 1, on the batch that lines 2 to 4 sampled (`BatchSampler`).

        It is the definition. `cloning`, `stack` and `device_stack` compute the same by calls that are prepared once,
        and have to be changed with it; tests hold them to it.

        On a CUDA device it reads nothing back, samples nothing on the host, and does the same operations at every
        iteration: one recording of it serves all.

        Returns:
            Metrics, scalar tensors on the device: `loss/critic` (equation 6), `loss/diffusion` (5),
            `reward/objective` (7), `loss/actor` (8), and diagnostics.
        """
        stack = self._stack_on_device()
        if stack is not None:
            return {name: value[0] for name, value in stack.learn(side_by_side([batch]), [None]).items()}
        with matmul_precision(self.config.precision):
            if not self.policy.training:  # asked first: setting it walks through every module
                self.policy.train()
            prompts = self.encode(batch)
            condition = self.condition(batch, prompts)
            metrics: dict[str, Tensor] = {}
            if self.config.eta:  # 0 in the default preset, which clones alone
                loss, parts = self.critic_loss(batch, prompts, condition)
                norm = self.step("critic", loss)
                metrics |= {"loss/critic": loss.detach(), **parts, "grad/critic": norm}
            loss, parts = self.actor_loss(batch, condition, prompts)
            norm = self.step("policy", loss)
            metrics |= {"loss/actor": loss.detach(), **parts, "grad/policy": norm}
            if self.config.eta:
                self.track("critic", self.config.tau)
            return metrics  # the EMA, which acts, follows in `follow`

    def _stack_on_device(self) -> DeviceStack | None:
        """What does the iteration in few launches, on a CUDA device and where no prompt is read."""
        if self.choose_on_host or sharding.is_shared():
            return None
        if self._on_device is None or not self._on_device.in_place:
            from llmdpd.methods.llmdpd.device_stack import DeviceStack, stackable_on_device

            # Which the learner holds itself.
            self._on_device = DeviceStack([weakref.proxy(self)]) if stackable_on_device([self]) else None
        return self._on_device

    def critic_loss(
        self, batch: PromptedBatch, prompts: EncodedPrompts, condition: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 6: mean squared error of Q_1 and Q_2 to r + gamma (1 - terminal) min Q̄(s', a'_0), summed.

        Args:
            prompts: the batch's, and condition: of its observations under them, both by the policy in training.
        """
        config = self.config
        with torch.no_grad():
            ema_prompts = self.encode(batch, self.ema_policy)
            next_for_ema = self.condition(batch, ema_prompts, following=True, network=self.ema_policy)
            actions = self._sample(self.ema_policy, next_for_ema)
            # The critics read the policy's own context, old and new state alike; what acts is the average's.
            next_state, _ = self.condition(batch, prompts, following=True)
            prompt = self._critic_prompt(condition, len(actions))
            next_value = self.target_critic.minimum(next_state, actions, prompt, config.precision)
            target = batch.rewards * config.reward_scale + config.gamma * (1 - batch.terminals) * next_value
        loss, mean = self.critic.regression(condition.state.detach(), batch.actions, prompt, target, config.precision)
        return loss, {"q/mean": mean, "q/target": target.mean()}

    def actor_loss(
        self, batch: PromptedBatch, condition: Condition, prompts: EncodedPrompts | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 8: the diffusion loss minus lambda times the reward objective, lambda = eta / mean |Q|."""
        diffusion = self.diffusion_loss(batch, condition, prompts)
        metrics = {"loss/diffusion": diffusion.detach()}
        if not self.config.eta:
            return diffusion, metrics
        with self.frozen("critic"):
            objective, scale = self.reward_objective(condition)
        metrics["reward/objective"] = objective.detach()
        return diffusion - self.config.eta / scale.clamp_min(1e-6) * objective, metrics

    def diffusion_loss(
        self, batch: PromptedBatch, condition: Condition, prompts: EncodedPrompts | None = None
    ) -> Tensor:
        """Equation 5: mean squared error between sampled and predicted noise, k uniform in 1 … K.

        prompts: those of the condition, where they are known: each is multiplied once then, not once a state.

        Of a policy with chunks the mean is over the numbers of all actions within their episodes, as ACT masks its own
        (Zhao et al. 2023); all numbers of a chunk are noisy to the same k.
        """
        clean, real = self._cloned(batch)
        alpha_bar = self.policy.alpha_bar
        timesteps = randint(len(alpha_bar), (len(clean),), clean.device)
        noise = randn(clean.shape, clean.device)
        level = alpha_bar[timesteps, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        prompt = condition.prompt if prompts is None else prompts.pooled
        predicted = self.policy.net(noisy, timesteps, condition.state, prompt, self.config.precision)
        if real is None:
            return F.mse_loss(predicted, noise)
        weight = real.to(noise.dtype)
        error = (predicted - noise).square().unflatten(1, (weight.shape[1], -1)).mean(-1)
        return (weight * error).sum() / sharding.mean(weight.sum())

    def reward_objective(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Equation 7: mean Q(s, a_0) by one of the two critics at random, with the gradient through the whole chain.

        Returns:
            The objective, and mean |Q| of the other critic at the same actions: what lambda is normalised by.
        """
        state, actions = condition.state.detach(), self._sample(self.policy, condition)
        prompt, precision = self._critic_prompt(condition, len(actions)), self.config.precision
        take_first = torch.rand((), device=state.device) < 0.5
        if self.choose_on_host:
            objective, scale = self.critic.objective(state, actions, prompt, bool(take_first), precision)
        else:
            first, second = self.critic(state, actions, prompt, precision)
            objective = torch.where(take_first, first, second).mean()
            scale = torch.where(take_first, second, first).detach().abs().mean()
        return objective, sharding.mean(scale)

    def _cloned(self, batch: PromptedBatch) -> tuple[Tensor, Tensor | None]:
        """What is cloned: actions [B, A], and None; or chunks [B, H A], and which of their actions are real [B, H].

        An action past the episode's end is the last one over again: the network has to be given something there, and
        this is nearer to what it denoises when acting, where no episode is known to end, than zeros would be.
        """
        source: PromptedBatch | StepWindows = batch
        if self.policy.config.chunk > 1:
            assert batch.windows is not None, "the sampler was made with the chunk as its horizon"
            source = batch.windows
        actions = cloned_actions(source, self.config.clone)
        return (actions.flatten(1), source.mask) if isinstance(source, StepWindows) else (actions, None)

    def _sample(self, policy: DiffusionPolicy, condition: Condition) -> Tensor:
        state, prompt = condition
        plan, precision = policy.training_sampler, self.config.precision
        noise = self._chain_noise(plan.steps, state) if sharding.is_shared() else None
        return reverse_diffusion(policy.net, state, prompt, plan, noise=noise, precision=precision)

    def _chain_noise(self, steps: int, state: Tensor) -> Tensor:
        """The noise [K + 1, B, A] of the own rows of a batch, all of which is drawn by one key."""
        key, rows = int(torch.randint(2**63 - 1, (), device=state.device)), sharding.own_rows(len(state), state.device)
        noise = philox_normal(key, len(state), 1, steps + 1, self.policy.action_dim, state.device, rows)
        return noise[:, :, 0].to(state.dtype)

    def _critic_prompt(self, condition: Condition, batch: int) -> Tensor:
        """The prompt vectors as the critics see them, [B, Z]; equation 8 alone trains the encoders."""
        return condition.prompt.detach().expand(batch, -1)


_AS_WRITTEN = {name: getattr(LLMDPD, name) for name in _AS_PREPARED}  # one that is replaced in the class counts, too


def check_chunk(chunk: int, eta: float) -> None:
    """Raise `InputError` for a reward term (eta above 0) together with chunks of several actions.

    Equation 6 learns the value of a policy that sees every state before it acts, from single transitions; one that
    executes H actions by one look has another value. And equation 7 would raise the value of a chunk's first action
    alone, with nothing said of the others that are executed after it. Critics of whole chunks (Li et al. 2025,
    Q-chunking) are another algorithm.
    """
    if chunk > 1 and eta != 0:
        raise InputError(
            "policies with chunks clone alone: the critics value single actions",
            field="eta",
            found=f"{eta:g} with chunks of {chunk} actions (network.chunk)",
            expected="0, or network.chunk of 1",
            hint="--method.eta 0 clones alone",
        )
