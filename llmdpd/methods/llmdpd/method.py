"""Algorithm 1 of the paper: policy diffusion under prompts, with double Q-learning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.diffusion import reverse_diffusion
from llmdpd.diffusion.schedules import Precision
from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.optimisation import (
    OptimisationConfig,
    clip_gradient,
    ema_rate,
    lerp,
    rate_factor,
    rate_tensor,
    set_rate,
)
from llmdpd.nn.context import Condition, EncodedPrompts
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.policy_network import ConditionalPolicy
from llmdpd.utils.device import matmul_precision


@dataclass(frozen=True)
class LLMDPDConfig(OptimisationConfig):
    """Algorithm 1. Where the paper is silent the values are Diffusion-QL's, the framework that it builds on."""

    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    gamma: float = 0.99
    """Discount a step."""
    tau: float = 0.005
    """Polyak rate of the target critics, an iteration."""
    eta: float = 1.0
    """Weight of the reward term: lambda = eta / mean |Q| (equation 8); 0 clones alone and trains no critic."""
    reward_scale: float = 1.0
    """Factor on rewards in the critics' targets."""
    critic_sees_prompts: bool = False
    """Condition the critics on the prompt vectors too; the paper's critics are Q(s, a)."""
    precision: Precision = "fp32"
    """Of the hidden layers' products in all three networks; encoders may follow. Weights, sums, optimisers: float32."""
    critic_hidden: int = 256
    """Width of the critics' three hidden layers."""
    clone: Literal["executed", "expert"] = "executed"
    """What equation 5 clones: the executed actions (the paper), or the expert's clean action in the visited state."""


class LLMDPD:
    """Policy, critics, their targets and optimisers, and one iteration of Algorithm 1.

    An iteration (`update`) is three parts: `schedule` and `follow` decide by the iteration's number, on the host;
    `learn` is the work of the device, the same at every iteration, so that a CUDA graph can hold it.

    Args:
        policy: the networks with parameters psi, phi, theta.
        config: see `LLMDPDConfig`.
        iterations: length of the run, for the learning-rate schedule.

    Raises:
        InputError: a reward term for a policy with chunks (see `check_chunk`).
    """

    def __init__(self, policy: ConditionalPolicy, config: LLMDPDConfig, iterations: int) -> None:
        check_chunk(policy.config.chunk, config.eta)
        self.config, self.iterations = config, iterations
        self.policy = policy
        self.ema_policy = copy.deepcopy(policy).eval().requires_grad_(False)
        prompt_dim = policy.context.prompt_dim if config.critic_sees_prompts else 0
        device = next(policy.parameters()).device
        self.critic = DoubleQ(policy.context.state_dim, policy.action_dim, prompt_dim, config.critic_hidden).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # On the CPU it costs nothing to read a draw, and saves the other critic's backward pass.
        self.choose_on_host = device.type == "cpu"
        capturable = device.type == "cuda"
        self.policy_optimizer = torch.optim.AdamW(
            policy.parameters(),
            rate_tensor(config.lr, device),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=capturable,
        )
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), rate_tensor(config.critic_lr, device), fused=True, capturable=capturable
        )

        # Kept: walking through the modules costs the host a tenth of an iteration.
        self._parameters: dict[nn.Module, list[Tensor]] = {
            module: list(module.parameters()) for module in self.modules.values()
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every network by name: with the optimisers, the schema of a checkpoint."""
        names = ("policy", "ema_policy", "critic", "target_critic")
        return {name: getattr(self, name) for name in names}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimiser by name."""
        return {"policy_optimizer": self.policy_optimizer, "critic_optimizer": self.critic_optimizer}

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        """One iteration of Algorithm 1 (lines 5 to 13), on one batch; iteration counts from 0.

        Returns:
            Metrics, scalar tensors on the device: `loss/critic` (equation 6), `loss/diffusion` (5),
            `reward/objective` (7), `loss/actor` (8), and diagnostics.
        """
        self.schedule(iteration)
        metrics = self.learn(batch)
        self.follow(iteration)
        return metrics

    def schedule(self, iteration: int) -> None:
        """What the host decides before the iteration: the learning rates, written where the optimisers read them."""
        config = self.config
        factor = rate_factor(config, iteration, self.iterations)
        set_rate(self.policy_optimizer, config.lr * factor)
        set_rate(self.critic_optimizer, config.critic_lr * factor)

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """Lines 5 to 12: every loss, every gradient step, the target critics. Returns `update`'s metrics.

        It reads nothing back from a CUDA device, draws nothing on the host then, and does the same operations at every
        iteration: one recording of it serves all.
        """
        with matmul_precision(self.config.precision):
            return self._learn(batch)

    def _learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        with_reward = self.config.eta != 0
        if not self.policy.training:  # asked first: setting it walks through every module
            self.policy.train()
        prompts = self.policy.encode(batch.text, batch.tokens, batch.keep)
        condition = self.policy.condition(batch.observations, prompts, None, batch.timesteps)
        if with_reward:
            metrics |= self._update_critic(batch, prompts, condition)
        metrics |= self._update_actor(batch, condition, with_reward)
        if with_reward:
            self._lerp(self.target_critic, self.critic, self.config.tau)
        return metrics

    def follow(self, iteration: int) -> None:
        """The EMA's step after the iteration, at its marks: a copy before `ema_start`, then an average."""
        rate = ema_rate(self.config, iteration)
        if rate is not None:
            self._lerp(self.ema_policy, self.policy, rate)

    def critic_loss(
        self, batch: PromptedBatch, prompts: EncodedPrompts, condition: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 6: mean squared error of Q_1 and Q_2 to r + gamma (1 - terminal) min Q̄(s', a'_0), summed.

        `prompts` and `condition` are the policy's, of the batch's prompts and observations.
        """
        with torch.no_grad():
            ema_prompts = self.ema_policy.encode(batch.text, batch.tokens, batch.keep)
            acting = self.ema_policy.condition(batch.next_observations, ema_prompts, None, batch.timesteps + 1)
            actions = self._sample(self.ema_policy, acting)
            # The critics read the policy's own context, old and new state alike; what acts is the average's.
            following = self.policy.condition(batch.next_observations, prompts, None, batch.timesteps + 1)
            next_prompt = self._critic_prompt(condition, len(actions))
            next_value = self.target_critic.minimum(following.state, actions, next_prompt, self.config.precision)
            target = batch.rewards * self.config.reward_scale + self.config.gamma * (1 - batch.terminals) * next_value
        q1, q2 = self._values(condition, batch.actions)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        return loss, {"q/mean": q1.detach().mean(), "q/target": target.mean()}

    def diffusion_loss(self, batch: PromptedBatch, condition: Condition) -> Tensor:
        """Equation 5: mean squared error between drawn and predicted noise, k uniform in 1 … K.

        Of a policy with chunks the mean is over the numbers of all actions within their episodes, as ACT masks its own
        (Zhao et al. 2023); all numbers of a chunk are noisy to the same k.
        """
        clean, real = self._cloned(batch)
        alpha_bar = self.policy.alpha_bar
        timesteps = torch.randint(len(alpha_bar), (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        level = alpha_bar[timesteps, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = self.policy.net(noisy, timesteps, condition.state, condition.prompt, self.config.precision)
        if real is None:
            return F.mse_loss(predicted, noise)
        weight = real.to(noise.dtype)
        error = (predicted - noise).square().unflatten(1, (weight.shape[1], -1)).mean(-1)
        return (weight * error).sum() / weight.sum()

    def _cloned(self, batch: PromptedBatch) -> tuple[Tensor, Tensor | None]:
        """What is cloned: actions [B, A], and None; or chunks [B, H A], and which of their actions are real [B, H].

        An action past the episode's end is the last one over again: the network has to be given something there, and
        this is nearer to what it denoises when acting, where no episode is known to end, than zeros would be.
        """
        source: PromptedBatch | StepWindows = batch
        if self.policy.config.chunk > 1:
            assert batch.windows is not None, "the sampler was made with the chunk as its horizon"
            source = batch.windows
        actions = source.expert_actions if self.config.clone == "expert" else source.actions
        assert actions is not None, "checked when the training data is prepared"
        return (actions.flatten(1), source.mask) if isinstance(source, StepWindows) else (actions, None)

    def reward_objective(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Equation 7, mean Q(s, a_0) with the gradient through the whole chain, by one of the two critics at random.

        Returns:
            The objective, and mean |Q| of the other critic at the same actions: what lambda is normalised by.
        """
        values = self._values(condition, self._sample(self.policy, condition))
        chosen, other = self._in_random_order(values)
        return chosen.mean(), other.detach().abs().mean()

    def _in_random_order(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = values
        keep = torch.rand((), device=first.device) < 0.5
        if self.choose_on_host:
            return (first, second) if bool(keep) else (second, first)
        return torch.where(keep, first, second), torch.where(keep, second, first)

    def _update_critic(self, batch: PromptedBatch, prompts: EncodedPrompts, condition: Condition) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(batch, prompts, condition)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["grad/critic"] = self._clip(self.critic)
        self.critic_optimizer.step()
        return {"loss/critic": loss.detach(), **metrics}

    def _update_actor(self, batch: PromptedBatch, condition: Condition, with_reward: bool) -> dict[str, Tensor]:
        """Equation 8: the diffusion loss minus lambda times the reward objective."""
        loss = diffusion = self.diffusion_loss(batch, condition)
        metrics = {"loss/diffusion": diffusion.detach()}
        if with_reward:
            with _frozen(self._parameters[self.critic]):
                objective, scale = self.reward_objective(condition)
            loss = diffusion - self.config.eta / scale.clamp_min(1e-6) * objective
            metrics["reward/objective"] = objective.detach()
        self.policy_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["grad/policy"] = self._clip(self.policy)
        self.policy_optimizer.step()
        return {"loss/actor": loss.detach(), **metrics}

    def _sample(self, policy: ConditionalPolicy, condition: Condition) -> Tensor:
        state, prompt = condition
        return reverse_diffusion(policy.net, state, prompt, policy.plan, precision=self.config.precision)

    def _values(self, condition: Condition, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q_1 and Q_2 [B] in the policy's own features."""
        prompt = self._critic_prompt(condition, len(actions))
        values: tuple[Tensor, Tensor] = self.critic(condition.state.detach(), actions, prompt, self.config.precision)
        return values

    def _critic_prompt(self, condition: Condition, batch: int) -> Tensor:
        """The prompt vectors as the critics see them, [B, Z]; equation 8 alone trains the encoders."""
        return condition.prompt.detach().expand(batch, -1)

    def _lerp(self, target: nn.Module, source: nn.Module, rate: float) -> None:
        lerp(self._parameters[target], self._parameters[source], rate)

    def _clip(self, module: nn.Module) -> Tensor:
        """The norm of the module's gradient, which is then cut to the bound where there is one."""
        return clip_gradient(self._parameters[module], self.config.grad_clip)


def check_chunk(chunk: int, eta: float) -> None:
    """Raise `InputError` for a reward term (eta above 0) together with chunks of several actions.

    Equation 6 learns the value of a policy that sees every state before it acts, from single transitions; one that
    plays H actions by one look has another value. And equation 7 would raise the value of a chunk's first action alone,
    with nothing said of the others that are played after it. Critics of whole chunks (Li et al. 2025, Q-chunking) are
    another algorithm.
    """
    if chunk > 1 and eta != 0:
        raise InputError(
            "policies with chunks clone alone: the critics value single actions",
            field="agent.eta",
            found=f"{eta:g} with chunks of {chunk} actions (policy.chunk)",
            expected="0, or policy.chunk of 1",
            hint="--agent.eta 0 clones alone",
        )


@contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
