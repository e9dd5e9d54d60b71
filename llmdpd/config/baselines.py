"""Baselines as changes of a preset: the same tasks, data, features and evaluation, learned by another method.

Prompts are left out (but for prompt-dt and mtdiff, which read an example), and with them what is there for their sake:
augmented scenes, prompt dropout, chunks, views of a scene. Options can put them back. What each method's own settings
are from: docs/baselines.md.
"""

from __future__ import annotations

from dataclasses import replace

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.methods.networks import METHODS, ONLINE, SEQUENCE_MODELS, Method
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.training.augmentation import AugmentationConfig

_OWN = ("llmdpd", "trajectory-diffusion")
"""Methods of this project's: what a preset says of them holds."""


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """The configuration as `--agent NAME` starts from it.

    Raises:
        InputError: no such method.
    """
    if name not in METHODS:
        raise InputError(
            "unknown method",
            field="--agent",
            found=name,
            expected=", ".join(METHODS),
            hint=f"nearest names: {nearest_names(name, METHODS)}",
        )
    method: Method = METHODS[name]
    if method == config.method or method in _OWN:
        return replace(config, method=method)
    clone = config.cloned[0]
    context = replace(config.policy.context, text=False, trajectory=False, text_dropout=0.0, trajectory_dropout=0.0)
    preset = config
    config = replace(
        config,
        method=method,
        policy=replace(config.policy, context=context, chunk=1),
        training=replace(config.training, augmentation=AugmentationConfig()),
        acting=ActingConfig(samples=1, noise_scale=0.0),
    )
    if method == "diffusion-ql":
        # Its published settings; the bound on gradients is the preset's, which is the task's.
        agent = LLMDPDConfig(grad_clip=config.agent.grad_clip, lr_final=0.0)
        policy = replace(config.policy, diffusion_steps=PolicyConfig.diffusion_steps)
        return replace(config, agent=agent, policy=policy, acting=ActingConfig())
    if method == "diffusion-bc":
        acting = replace(preset.acting, samples=1, replan=None, views=1)
        return replace(config, agent=replace(config.agent, eta=0.0), acting=acting)
    if method in SEQUENCE_MODELS:
        # Published: 64 windows a batch, a prompt of the last 5 steps.
        training = replace(config.training, batch_size=64, prompts_per_batch=8)
        encoder = replace(context.encoder, steps=5, sampling="last")
        own = replace(context, kind="pooled", trajectory=method == "prompt-dt", encoder=encoder)
        return replace(config, training=training, policy=replace(config.policy, context=own))
    if method == "mtdiff":
        # Published: 20 steps of an episode in a row, a chain of 200, 16 windows a prompt. Five steps of DDIM walk it.
        encoder = replace(context.encoder, steps=20, sampling="window")
        own = replace(context, kind="pooled", trajectory=True, encoder=encoder)
        policy = replace(config.policy, context=own, diffusion_steps=200)
        training = replace(config.training, batch_size=16 * config.training.prompts_per_batch)
        acting = ActingConfig(samples=1, sampler="ddim", steps=5)
        return replace(config, training=training, policy=policy, acting=acting)
    if method in ONLINE:
        # stable-baselines3's batch; its networks see observations as they are.
        training = replace(config.training, batch_size=256, prompts_per_batch=1)
        own = replace(context, kind="pooled", features="raw")
        return replace(config, training=training, policy=replace(config.policy, context=own))
    return replace(config, bc=replace(config.bc, clone=clone)) if method == "bc" else config
