"""Cloning by policy diffusion without prompts: Algorithm 1's equation 5 alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from llmdpd.errors import InputError
from llmdpd.methods.base import Start
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.utils.bounds import NonNegative


@dataclass(frozen=True)
class DiffusionBCConfig(LLMDPDConfig):
    """Algorithm 1 with no reward term."""

    name = "diffusion-bc"

    eta: NonNegative = 0.0
    """Weight of the reward term: 0, since this method clones alone."""

    @classmethod
    def from_preset(cls, start: Start) -> DiffusionBCConfig:
        own = {field.name: getattr(start.diffusion, field.name) for field in fields(start.diffusion)}
        own["network"] = replace(start.diffusion.network, context=start.promptless, chunk=1)
        own["acting"] = replace(start.diffusion.acting, samples=1, action_horizon=None)
        own["augmentation"], own["self_prompted"] = type(start.diffusion.augmentation)(), 0.0
        return cls(**own | {"eta": 0.0})

    def check(self) -> None:
        if self.eta:
            raise InputError(
                "diffusion-bc clones alone", field="eta", found=self.eta, expected="0, or --method diffusion-ql"
            )
        super().check()


class DiffusionBC(LLMDPD):
    """Algorithm 1 under another configuration."""

    Config = DiffusionBCConfig
