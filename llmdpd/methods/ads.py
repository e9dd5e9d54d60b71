"""ADS (Wang et al. 2024): MCQ (Lyu et al. 2022) whose critics learn from transitions so that they fit others, too.

MCQ is SAC whose critics follow two regressions: lambda (Q(s, a) - y)² at the data's actions, y SAC's target, and
(1 - lambda) (Q(s, a') - y')² at the policy's actions a' in s and s', y' = min_j max_n Q̄_j(s, a_n) over actions a_n of a
VAE of the data. After a share of the run every batch is split into a part for training and one for validation:

1. theta' = theta - inner_lr grad L_training(theta), and the actor takes a step of its own against theta';
2. theta follows the gradient of L_training(theta) + weight L_validation(theta'), through theta' (MAML);
3. the split is the hardest one: those transitions validate whose loss l_i - step (g_i . G) is greatest, g_i their own
   gradient and G that of the part for training (a first-order expansion of l_i after a step on that part), in rounds.

Source: the paper, and the authors' code for MCQ+ADS (github.com/DkING-lv6/ADS), from which the settings are. Not theirs
are lambda = 0.9 (OfflineRL-Kit's for hopper medium-replay), two rounds in place of ten, the order of the steps within
an iteration, and the networks' widths: the preset's, where the code has 400, and 750 for the VAE. In the code, parts
are drawn at random in the training loop; what finds the hardest split is written, over pools of 5,000 transitions in
five clusters, and never called. Here it is the option `split`, over the batch itself; with the loop's weight the
transitions with the greatest errors are then hardly learned, and values go astray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.base import Start
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.soft_actor_critic import SoftActorCritic, SoftActorCriticConfig
from llmdpd.nn.actor import SquashedGaussianPolicy
from llmdpd.nn.context import Condition, EncodedPrompts
from llmdpd.nn.layers import mlp
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Count, Fraction, NonNegative, Width

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ADSConfig(SoftActorCriticConfig):
    """MCQ+ADS."""

    name = "ads"
    action_use = "learns from"

    data_weight: Fraction = 0.9
    """lambda, the weight of the data's actions against the policy's."""
    samples: Count = 10
    """Actions of the VAE for each state."""
    behaviour_lr: NonNegative = 1e-3
    """Learning rate of the VAE."""
    behaviour_hidden: Width = 256
    """Width of the VAE's hidden layers."""
    start: Fraction = 0.4
    """Share of the run that is MCQ alone."""
    split: Literal["random", "adversarial"] = "random"
    """How a batch is split: at random as the authors' loop does, or the hardest split."""
    training_share: Fraction = 0.8
    """Share of a batch that the critics are trained on; the rest validates."""
    inner_lr: NonNegative = 5e-5
    """Length of the critics' step that is looked ahead."""
    validation_weight: NonNegative = 1e-4
    """Weight of the loss of the part that validates."""
    split_step: NonNegative = 1e-6
    """Length of the step in the expansion by which the hardest split is found."""
    split_rounds: Count = 2
    """Rounds in which it is found; the authors' ten change nothing more at their step."""

    @classmethod
    def from_preset(cls, start: Start) -> Self:
        width = start.diffusion.network.hidden_dim
        return cls(**vars(super().from_preset(start)) | {"critic_hidden": width, "behaviour_hidden": width})

    def check(self) -> None:
        """Raise `InputError` for a batch of which no part would validate, beside what every method checks."""
        super().check()
        if self.training_share == 1:
            found, expected = self.training_share, "below 1"
            raise InputError("no transition would validate", field="training_share", found=found, expected=expected)
        if self.batch_size < 2:
            found, expected = self.batch_size, "at least 2, as a part of them validates"
            raise InputError("too few transitions to split", field="batch_size", found=found, expected=expected)


class MCQPolicy(SquashedGaussianPolicy):
    """The actor of MCQ: two hidden layers."""

    layers = 2


class ActionVAE(nn.Module):
    """A VAE of the data's actions in a state: p(a | s, u), with u of twice the action's size."""

    def __init__(self, inputs: int, action_dim: int, bound: float, hidden: int) -> None:
        super().__init__()
        self.bound, self.latent = bound, 2 * action_dim
        self.encoder = mlp(inputs + action_dim, (hidden, hidden), 2 * self.latent)
        self.decoder = mlp(inputs + self.latent, (hidden, hidden), action_dim)

    def loss(self, state: Tensor, action: Tensor) -> Tensor:
        """Mean squared error of actions [B, A] that were encoded and decoded, and the divergence of u from N(0, 1)."""
        mean, log_std = self.encoder(torch.cat([state, action], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        decoded = self._decode(state, mean + log_std.exp() * sharding.randn(mean.shape, mean.device))
        divergence = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean()
        return F.mse_loss(decoded, action) + divergence

    def sample(self, state: Tensor) -> Tensor:
        """An action for each of B states [B, A], u cut at ± 0.5."""
        return self._decode(state, sharding.randn((len(state), self.latent), state.device).clamp(-0.5, 0.5))

    def _decode(self, state: Tensor, latent: Tensor) -> Tensor:
        return self.bound * torch.tanh(self.decoder(torch.cat([state, latent], -1)))


class Regression(NamedTuple):
    """What the critics of MCQ are regressed on, for B transitions: 3 B conditions, actions and targets.

    They are in three parts of B each: the data's actions in s, and the policy's in s and in s'.
    """

    condition: Condition
    actions: Tensor
    targets: Tensor

    def rows(self, chosen: Tensor) -> Regression:
        """Those of some transitions, by their places int64 [N]."""
        count = len(self.targets) // 3
        places = torch.cat([chosen, chosen + count, chosen + 2 * count])
        state, prompt = (part.index_select(0, places) for part in self.condition)
        return Regression(Condition(state, prompt), self.actions[places], self.targets[places])


class ADS(SoftActorCritic[ADSConfig]):
    """MCQ's actor, critics, temperature and VAE."""

    Config = ADSConfig
    network_class = MCQPolicy
    same_work = False  # the critics' loss becomes another one in the run

    def __init__(self, network: SquashedGaussianPolicy, config: ADSConfig, iterations: int) -> None:
        super().__init__(network, config, iterations)
        inputs = network.context.state_dim + network.context.prompt_dim
        behaviour = ActionVAE(inputs, network.action_dim, network.config.action_bound, config.behaviour_hidden)
        self.behaviour = self.modules["behaviour"] = behaviour.to(network.device)
        self._optimise("behaviour", list(behaviour.parameters()), config.behaviour_lr)
        self._ahead = self._copy(network)  # written anew whenever it is used: no part of a checkpoint
        self._splits = False

    def schedule(self, iteration: int) -> None:
        """The learning rates, and whether the batch is split."""
        super().schedule(iteration)
        self._splits = iteration >= self.config.start * self.iterations

    def critic_loss(self, batch: PromptedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """MCQ's loss of both critics together, or ADS's over a split of the batch; the VAE takes its step first."""
        with torch.no_grad():
            prompts = self.encode(batch)  # anew: the actor's step has changed the encoders
            now = self.condition(batch, prompts)
        cloning = self.behaviour.loss(now.joined(), batch.actions)
        norm = self.step("behaviour", cloning)
        whole = self.regression(batch, prompts, self.policy)
        rows = len(batch.rewards)
        q = self.critic(now, batch.actions)[0].detach()
        metrics = {"q/mean": q.mean(), "q/target": whole.targets[:rows].mean()}
        metrics |= {"loss/behaviour": cloning.detach(), "grad/behaviour": norm}
        if not self._splits:
            return self.errors(whole).mean(1).sum(), metrics
        training, validation = self.split(whole)
        loss = sharding.own_mean(self.errors(whole.rows(sharding.here(training, rows))), len(training)).sum()
        ahead = self.looked_ahead(loss)
        unseen = self.regression(batch, prompts, self.actor_ahead(now, ahead)).rows(sharding.here(validation, rows))
        validating = sharding.own_mean(self.errors(unseen, ahead), len(validation)).sum()
        return loss + self.config.validation_weight * validating, metrics

    @torch.no_grad()
    def regression(self, batch: PromptedBatch, prompts: EncodedPrompts, actor: SquashedGaussianPolicy) -> Regression:
        """Conditions, actions and targets of the batch's transitions under an actor."""
        config, count = self.config, len(batch.rewards)
        parts = [self.condition(batch, prompts, following) for following in (False, False, True)]
        state = torch.cat([part.state for part in parts])
        prompt = torch.cat([part.prompt.expand(count, -1) for part in parts])
        condition = Condition(state, prompt)
        at_both = Condition(state[count:], prompt[count:])
        actions, density = (found[0] for found in actor.rsample(at_both))
        value = self.target_critic.minimum(parts[2], actions[count:]) - self._entropy_weight() * density[count:]
        target = batch.rewards * config.reward_scale + config.gamma * (1 - batch.terminals) * value
        targets = torch.cat([target, self.best_of_the_data(at_both)])
        return Regression(condition, torch.cat([batch.actions, actions]), targets)

    def best_of_the_data(self, condition: Condition) -> Tensor:
        """min over the target critics of the greatest of their values at the VAE's actions [B]."""
        repeated = Condition(*(part.repeat(self.config.samples, 1) for part in condition))
        values = self.target_critic(repeated, self.behaviour.sample(repeated.joined()))
        return torch.minimum(*(value.view(self.config.samples, -1).amax(0) for value in values))

    def errors(self, data: Regression, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weighted squared errors of both critics for each transition [2, B], by these parameters of theirs."""
        given: dict[str, Tensor] = dict(parameters or self.critic.named_parameters())
        values = torch.func.functional_call(self.critic, given, (data.condition, data.actions))
        squared = (torch.stack(values) - data.targets).square().unflatten(1, (3, -1))
        weight = self.config.data_weight
        return weight * squared[:, 0] + (1 - weight) * squared[:, 1:].mean(1)

    def split(self, data: Regression) -> tuple[Tensor, Tensor]:
        """The places in the whole batch of the transitions for training, and of those that validate."""
        count = sharding.whole_batch(len(data.targets) // 3)
        held = min(max(count - int(count * self.config.training_share), 1), count - 1)
        if self.config.split == "random":
            order = torch.randperm(count, device=data.targets.device)
            return order[held:], order[:held]
        parameters = {name: p.detach() for name, p in self.critic.named_parameters()}
        training = torch.randint(count, (1,), device=data.targets.device)
        for _ in range(self.config.split_rounds):
            order = self.hardness(data, parameters, training).argsort(descending=True)
            training, validation = order[held:], order[:held]
        return training, validation

    def hardness(self, data: Regression, parameters: Mapping[str, Tensor], training: Tensor) -> Tensor:
        """l_i - step (g_i . G) of every transition [B], of the first critic, G the gradient of those in `training`."""
        seen = data.rows(sharding.here(training, len(data.targets) // 3))

        def loss(p: dict[str, Tensor]) -> Tensor:
            return sharding.own_mean(self.errors(seen, p)[0], len(training))

        own = torch.func.grad(loss)(dict(parameters))
        gradient = dict(zip(own, sharding.means(list(own.values())), strict=True))
        losses, along = torch.func.jvp(lambda p: self.errors(data, p)[0], (dict(parameters),), (gradient,))[:2]
        return sharding.gathered(losses - self.config.split_step * along)

    def looked_ahead(self, loss: Tensor) -> dict[str, Tensor]:
        """The critics' parameters a step down the loss, which the gradient goes through."""
        parameters = dict(self.critic.named_parameters())
        gradients = sharding.means(torch.autograd.grad(loss, list(parameters.values()), create_graph=True))
        return {
            name: value - self.config.inner_lr * gradient
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }

    def actor_ahead(self, condition: Condition, critic: Mapping[str, Tensor]) -> SquashedGaussianPolicy:
        """A copy of the actor after Adam's first step up what the critics of these parameters say."""
        ahead, weights = self._ahead, list(self._ahead.net.parameters())
        with torch.no_grad():
            for mine, its in zip(weights, self.policy.net.parameters(), strict=True):
                mine.copy_(its)
        actions, density = (found[0] for found in ahead.rsample(condition))
        fixed = {name: value.detach() for name, value in critic.items()}
        value = torch.minimum(*torch.func.functional_call(self.critic, fixed, (condition, actions)))
        loss = (self._entropy_weight() * density - value).mean()
        with torch.no_grad():
            for weight, gradient in zip(weights, sharding.means(torch.autograd.grad(loss, weights)), strict=True):
                weight.sub_(self.config.lr * gradient / (gradient.abs() + 1e-8))
        return ahead

    def _entropy_weight(self) -> Tensor:
        return self.temperature.log.detach().exp()
