"""The policies' networks: prompts + state → context → reverse diffusion → action."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llmdpd.diffusion import NoiseMLP, SamplerPlan, alphas, sampler_plan
from llmdpd.diffusion.schedules import ScheduleName
from llmdpd.errors import InputError
from llmdpd.nn.context import ALL_KEPT, Condition, ContextConfig, EncodedPrompts, Keep, make_context
from llmdpd.nn.plan_denoiser import PlanConfig
from llmdpd.nn.sequence_model import GPT2Sizes, LoRAConfig, SequenceConfig
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.utils.bounds import ACTION_NUMBERS


@dataclass(frozen=True)
class PolicyConfig:
    """The policy's networks. Defaults are Diffusion-QL's."""

    hidden_dim: int = 256
    """Width of the noise network's three hidden layers (policy diffusion)."""
    time_dim: int = 16
    """Size of the time embedding."""
    diffusion_steps: int = 5
    """K, steps of the diffusion chain."""
    schedule: ScheduleName = "vp"
    """Variance schedule of the forward process."""
    action_bound: float = 1.0
    """Actions lie in ±this; x0 is clipped to it at every step."""
    chunk: int = 1
    """H, actions that the noise network denoises together (policy diffusion): the present one and those that follow."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """How prompts and state become the condition."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What trajectory diffusion denoises in place of an action, and its network."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """The sequence model of Decision Transformers."""
    language: GPT2Sizes = field(default_factory=GPT2Sizes)
    """Sizes of the language model that lamo is made of; read from its config.json, options of them are refused."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """The adapters of lamo's language model."""

    def check(self) -> None:
        """Raise `InputError` for sizes that don't fit each other; each by itself is held to `llmdpd.utils.bounds`."""
        for whose, part, sizes in (
            ("trajectory encoder", "context.encoder", self.context.encoder),
            ("retrieval context", "context.retrieval", self.context.retrieval),
            ("plan denoiser", "plan", self.plan),
            ("sequence model", "sequence", self.sequence),
            ("language model", "language", self.language),
        ):
            if sizes.width % sizes.heads:
                raise InputError(
                    f"the {whose}'s width cannot be shared out among its heads",
                    field=f"{part}.heads",
                    found=sizes.heads,
                    expected=f"a divisor of {sizes.width} (policy.{part}.width)",
                )
        if not self.context.retrieval.lookahead or min(self.context.retrieval.lookahead) < 0:
            raise InputError(
                "the retrieval context looks ahead",
                field="context.retrieval.lookahead",
                found=self.context.retrieval.lookahead,
                expected="one or more numbers of steps, none below 0",
            )
        if self.time_dim % 2:
            raise InputError(
                "the time embedding is sine and cosine pairs",
                field="time_dim",
                found=self.time_dim,
                expected="an even number",
            )


class Window(NamedTuple):
    """Steps of an episode that a policy learns from at once: `before` a transition, and `horizon` from it on.

    horizon 0: single transitions.
    """

    horizon: int = 0
    before: int = 0


class PromptedNetwork(nn.Module):
    """What the networks of all methods share: the encoders (psi, phi), the context, the diffusion chain's schedule.

    Args:
        state_dim: S. action_dim: A. embedding_dim: D, of the LLM's embeddings.
        config: see `PolicyConfig`.
    """

    alpha_bar: Tensor
    method: str = ""
    """What it was made for, see `llmdpd.methods.networks`."""
    diffuses = False
    """Whether it draws by walking a reverse chain."""

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.state_dim, self.action_dim, self.embedding_dim = state_dim, action_dim, embedding_dim
        self.context = make_context(state_dim, action_dim, embedding_dim, config.context)
        bar = np.cumprod(alphas(config.schedule, config.diffusion_steps))
        self.register_buffer("alpha_bar", torch.from_numpy(bar).float(), persistent=False)

    @property
    def window(self) -> Window:
        """What its batches carry beside transitions."""
        return Window()

    def fit(self, observations: Tensor) -> None:
        """Take the statistics of the training tasks' observations [N, S]."""
        self.context.features.fit(observations)

    @property
    def plan(self) -> SamplerPlan:
        """The sampler of training: DDPM over the K steps of the chain."""
        config = self.config
        return sampler_plan("ddpm", config.diffusion_steps, config.schedule, config.action_bound)

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        """Read P prompts (equations 1 and 3): LLM embeddings [P, D], trajectory tokens."""
        return self.context.encode(text, tokens, keep)

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, clock: Tensor) -> Condition:
        """Observations [B, S] under prompts, `index` [B] says which → the noise network's condition."""
        return self.context.condition(state, prompts, index, clock)


class ConditionalPolicy(PromptedNetwork):
    """pi(a | s, z_text, z_traj): encoders (psi, phi) and noise network (theta) of the paper's section 3.2.

    With `config.chunk` H above 1 it is pi(a_t … a_{t+H-1} | s_t, z_text, z_traj): to the noise network a chunk is one
    action of H A numbers, step after step (action chunking: Zhao et al. 2023, ACT; Chi et al. 2023, Diffusion Policy).

    Raises:
        InputError: chunks of more numbers than the samplers take.
    """

    diffuses = True

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        numbers = config.chunk * action_dim
        if numbers > ACTION_NUMBERS[1]:
            raise InputError(
                "a chunk has more numbers than the samplers take",
                field="policy.chunk",
                found=f"{config.chunk} actions of {action_dim} numbers: {numbers}",
                expected=f"{ACTION_NUMBERS[1]} numbers at most",
            )
        super().__init__(state_dim, action_dim, embedding_dim, config)
        self.net = NoiseMLP(
            self.context.state_dim, numbers, self.context.prompt_dim, config.hidden_dim, config.time_dim
        )

    @property
    def window(self) -> Window:
        """The steps of a chunk; of single actions none."""
        return Window(self.config.chunk) if self.config.chunk > 1 else Window()
