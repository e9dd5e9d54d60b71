"""Agents and batches of random numbers: what an iteration costs does not depend on what is learned."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from counting import Sizes, prompted_train_step, text_head, train_step, trajectory_encoder

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.ops.arguments import Precision
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT

ITERATIONS = 1_000_000
TEXT = 384  # numbers of a MiniLM embedding
DEMONSTRATION_STEPS = 200


@dataclasses.dataclass
class Training:
    """A learner and a batch that it learns from, the operations of an iteration, and the next iteration's number."""

    learner: LLMDPD
    batch: PromptedBatch
    flops: float
    iteration: int

    def update(self) -> dict[str, torch.Tensor]:
        """One iteration of Algorithm 1."""
        metrics = self.learner.update(self.batch, self.iteration)
        self.iteration += 1
        return metrics


def diffusion_ql(
    sizes: Sizes, device: torch.device, batch: int = 256, steps: int = 5, precision: Precision = "fp32"
) -> Training:
    """LLMDPD at Diffusion-QL's size: no prompt encoder, Diffusion-QL's hyperparameters."""
    config = DiffusionNetworkConfig(
        hidden_dim=sizes.hidden, diffusion_steps=steps, context=ContextConfig(text=False, trajectory=False)
    )
    learner_config = LLMDPDConfig(critic_hidden=sizes.hidden, precision=precision)
    policy = DiffusionPolicy(Spaces(sizes.state, sizes.action, 0), config).to(device)
    plain = dataclasses.replace(sizes, prompt=0)
    flops = train_step(plain, plain, batch, steps)
    learner = LLMDPD(policy, learner_config, ITERATIONS)
    # Past the iterations in which the average copies: from here one in five averages.
    return Training(learner, random_batch(sizes, device, batch, None), flops, learner_config.ema_start)


def metaworld(sizes: Sizes, device: torch.device, quick: bool = False, precision: Precision = "fp32") -> Training:
    """The whole of Algorithm 1 with its encoders: pooled prompts, critics that see them, one task a batch."""
    context = ContextConfig(
        features="combined", encoder=TrajectoryEncoderConfig(layers=2, width=128, inner=512, steps=25)
    )
    policy_config, batch = DiffusionNetworkConfig(context=context), 256
    if quick:
        encoder = TrajectoryEncoderConfig(layers=1, width=8, inner=8, steps=4)
        context = ContextConfig(text_dim=4, text_hidden=8, trajectory_dim=4, encoder=encoder)
        policy_config, batch = DiffusionNetworkConfig(hidden_dim=16, diffusion_steps=2, context=context), 4
    learner_config = LLMDPDConfig(
        lr=6e-4, grad_clip=1.0, eta=0.05, clone="expert", critic_sees_prompts=True, precision=precision
    )
    if quick:
        learner_config = dataclasses.replace(learner_config, critic_hidden=16)
    spaces = Spaces(sizes.state, sizes.action, TEXT, None if quick else LAYOUT)
    policy = DiffusionPolicy(spaces, policy_config).to(device)
    learner = LLMDPD(policy, learner_config, ITERATIONS)
    data = random_batch(sizes, device, batch, policy_config.context.encoder)
    return Training(learner, data, metaworld_flops(learner, batch), learner_config.ema_start)


def metaworld_flops(learner: LLMDPD, batch: int) -> float:
    """Operations of an iteration with encoders, from the learner's configuration."""
    policy = learner.policy
    config, context = policy.config, policy.config.context
    encoder = context.encoder
    actor = Sizes(policy.context.state_dim, policy.action_dim, policy.context.prompt_dim, config.hidden_dim)
    critic = Sizes(policy.context.state_dim, policy.action_dim, learner.critic.prompt_dim, learner.critic.hidden_dim)
    features = policy.context.state_dim + policy.action_dim
    tokens = min(DEMONSTRATION_STEPS, encoder.steps)
    encoders = text_head(policy.embedding_dim, context.text_hidden, context.text_dim) + trajectory_encoder(
        features, encoder.width, encoder.inner, encoder.layers, tokens, context.trajectory_dim
    )
    return prompted_train_step(actor, critic, batch, config.diffusion_steps, encoders)


def random_batch(
    sizes: Sizes, device: torch.device, batch: int, encoder: TrajectoryEncoderConfig | None
) -> PromptedBatch:
    """Transitions under one prompt, or under none where there is no encoder."""
    rng = np.random.default_rng(0)
    tokens = None
    if encoder is not None:
        parts = [rng.normal(size=(DEMONSTRATION_STEPS, n)).astype(np.float32) for n in (sizes.state, sizes.action)]
        tokens = make_tokens([(parts[0], parts[1])], encoder).to(device)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    actions = draw(batch, sizes.action).clamp(-1, 1)
    return PromptedBatch(
        observations=draw(batch, sizes.state),
        actions=actions,
        rewards=draw(batch),
        next_observations=draw(batch, sizes.state),
        terminals=(torch.arange(batch, device=device) % 100 == 99).float(),
        expert_actions=actions.clone(),
        timesteps=torch.arange(batch, device=device) % 500,
        text=None if encoder is None else draw(1, TEXT),
        tokens=tokens,
    )
