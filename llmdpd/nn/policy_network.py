"""What the networks of all methods share: encoders and context, and the interface by which a policy acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.context import ALL_KEPT, Condition, ContextConfig, EncodedPrompts, Keep, make_context
from llmdpd.nn.episode_memory import EpisodeMemory, History
from llmdpd.nn.spaces import ActionScaling, Spaces
from llmdpd.nn.statistics import Observations
from llmdpd.ops.acting import FrozenActor
from llmdpd.prompts.demonstration import TrajectoryTokens

# Many a matrix product rounds a row by how many there are; by multiples of eight less often.
_ROWS = 8


class Window(NamedTuple):
    """Steps of an episode that a policy learns from at once: `before` a transition, and `horizon` from it on.

    horizon 0: single transitions.
    """

    horizon: int = 0
    before: int = 0


class States(NamedTuple):
    """The present states of B episodes, and what a policy may know of them beside.

    observations [B, S]; prompt_of int64 [B], which prompt each is under (None: equal groups, one a prompt, in order);
    steps int64 [B], time steps within the episodes; history: the last steps of each, for policies conditioned on it.
    """

    observations: Tensor
    prompt_of: Tensor | None
    steps: Tensor
    history: History | None = None

    def padded(self, prompts: int) -> States:
        """The states that the networks are run on, the last one repeated up to a multiple of eight.

        Where the states lie in equal groups, one for each of several prompts, nothing is repeated.
        """
        repeated = 0 if self.prompt_of is None and prompts > 1 else -len(self.observations) % _ROWS
        if not repeated:
            return self
        index = None if self.prompt_of is None else repeating_last(self.prompt_of, repeated)
        history = None if self.history is None else History(*(repeating_last(part, repeated) for part in self.history))
        return States(repeating_last(self.observations, repeated), index, repeating_last(self.steps, repeated), history)


def repeating_last(rows: Tensor, count: int) -> Tensor:
    """Rows [B, …] with the last one so many times more, [B + count, …]."""
    return torch.cat([rows, rows[-1:].expand(count, *rows.shape[1:])]) if count else rows


class PolicyNetwork(nn.Module, ABC):
    """The network of a policy: encoders (psi, phi), context, and what names an action.

    Args:
        spaces: see `Spaces`.
        config: the network's configuration; `context_config()` of it says which prompts are read.
        context: another context than that of the configuration.
    """

    window = Window()
    """The steps that its batches carry beside transitions."""
    memory_length = 0
    """Steps of an episode that the policy is shown, the present one among them; 0: the present state alone."""
    reads_rewards = False
    """Whether a demonstration's rewards are read too."""
    heads: ClassVar[tuple[str, ...]] = ()
    """The modules that name the action from what the others have read; none where they are not apart."""

    def __init__(self, spaces: Spaces, config: NetworkConfig, context: ContextConfig | None = None) -> None:
        super().__init__()
        self.config, self.spaces = config, spaces
        self.state_dim, self.action_dim, self.embedding_dim = spaces.state_dim, spaces.action_dim, spaces.embedding_dim
        self.action_scaling = ActionScaling(spaces)
        self.reads = config.context_config()
        self.context = make_context(spaces, context or self.reads)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.context.features.mean.device

    def fit(self, observations: Observations, returns: Callable[[], Tensor]) -> None:
        """Take the statistics of the training tasks' observations [N, S]; `returns()`: returns-to-go [N].

        Observations are a tensor, or, of data on the disk, come in blocks of rows (`llmdpd.nn.statistics`).
        """
        self.context.features.fit(observations)

    def fit_beyond(self, observations: Observations, returns: Callable[[], Tensor]) -> list[str]:
        """Take those statistics anew that other data, given as to `fit`, lie far beyond; which these are, in words."""
        chosen = self.context.features.fit_beyond(observations)
        return [f"observation[{index}]" for index in chosen]

    def freeze_all_but_heads(self) -> str:
        """Let the heads alone have a gradient; which these are, and how many weights are frozen, in words.

        Raises:
            InputError: a network whose heads are not apart, or that has nothing but heads.
        """
        learned = [name for name, _ in self.named_parameters() if name.startswith(tuple(f"{h}." for h in self.heads))]
        every = dict(self.named_parameters())
        if len(learned) in (0, len(every)):
            raise InputError(
                "this policy has no heads that could learn alone",
                field="init.parts",
                found="heads" if not learned else "heads, and no encoder of prompts that would be frozen",
                expected="all",
            )
        for name, parameter in every.items():
            parameter.requires_grad_(name in learned)
        count = sum(every[name].numel() for name in learned)
        frozen = sum(parameter.numel() for parameter in every.values()) - count
        return f"{', '.join(self.heads)} alone, {count} weights; the other {frozen} are frozen"

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Read P prompts (equations 1 and 3): LLM embeddings [P, D], trajectory tokens."""
        return self.context.encode(text, tokens, keep)

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, steps: Tensor) -> Condition:
        """The condition of observations [B, S] under prompts; index and steps as in `States`."""
        return self.context.condition(state, prompts, index, steps)

    def episode_memory(self) -> EpisodeMemory | None:
        """A new memory of episodes for `States.history`; None where the policy is not conditioned on history."""
        return EpisodeMemory(self.memory_length, self.action_dim) if self.memory_length else None

    def make_critic(self, **sizes: Any) -> nn.Module:
        """Critics that choose among several samples, built with what `sizes` of them gives.

        Raises:
            InputError: the method's policies have none.
        """
        raise InputError("this method's policies have no critics", field="critic", expected="null")

    def diffusion_loss(self, states: States, prompts: EncodedPrompts, actions: Tensor, seeds: Tensor) -> Tensor | None:
        """Mean squared error [B] of the noise predicted at fixed noise on actions [B, A] within ±1, over all levels.

        None where the policy is no diffusion of single actions. The noise depends on seeds int64 [B] alone.
        """
        return None

    def freeze(self, prompts: EncodedPrompts, acting: Any, critic: Any) -> FrozenActor | None:
        """What samples in one C++ call as `sample` does, by copies of the weights and of P encoded prompts.

        None where the C++ code has no such call: on other devices, in other dtypes, and for other kinds of policies.
        """
        return None

    @abstractmethod
    def sample(self, states: States, prompts: EncodedPrompts, acting: Any, seeds: Tensor, critic: Any = None) -> Tensor:
        """Sample the actions of B episodes from their present states on, [B, H, A]; H is 1 without action chunks.

        Args:
            states: of B episodes. prompts: P of them, encoded.
            acting: the method's `ActingConfig`.
            seeds: int64 [B]; each episode's noise depends on its own seed alone, not on the batch that it is in.
            critic: what chooses among several samples, where the method has any.
        """


class ConditionedNetwork(PolicyNetwork):
    """A policy network that acts by the condition of the present state alone."""

    heads = ("net",)

    def sample(
        self, states: States, prompts: EncodedPrompts, acting: ActingConfig, seeds: Tensor, critic: Any = None
    ) -> Tensor:
        count, padded = len(states.observations), states.padded(len(prompts))
        state, prompt = self.condition(padded.observations, prompts, padded.prompt_of, padded.steps)
        condition = Condition(state[:count], prompt if prompt.dim() == 1 else prompt[:count])
        return self.sample_conditioned(states.observations, condition, acting, seeds, critic)

    @abstractmethod
    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: Any, seeds: Tensor, critic: Any
    ) -> Tensor:
        """Sample actions [B, H, A] in the condition of B states; see `PolicyNetwork.sample`."""
