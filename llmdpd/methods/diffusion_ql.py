"""Diffusion-QL (Wang et al. 2023): Algorithm 1 without prompts, by its published settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmdpd.methods.base import Start
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig
from llmdpd.utils.bounds import Fraction


@dataclass(frozen=True)
class DiffusionQLConfig(LLMDPDConfig):
    """Diffusion-QL. The bound on gradients is the preset's, which is the task's."""

    name = "diffusion-ql"

    lr_final: Fraction = 0.0
    """Fraction of the rates that is left at the end of a cosine decay per iteration; 1 keeps them constant."""

    @classmethod
    def from_preset(cls, start: Start) -> DiffusionQLConfig:
        network = replace(
            start.diffusion.network,
            context=start.promptless,
            chunk=1,
            diffusion_steps=DiffusionNetworkConfig.diffusion_steps,
        )
        return cls(network=network, grad_clip=start.diffusion.grad_clip, **start.batches)


class DiffusionQL(LLMDPD):
    """Algorithm 1 under another configuration."""

    Config = DiffusionQLConfig
