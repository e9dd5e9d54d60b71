"""One file or folder for each method: configuration, network, losses, preset, checks; found by name in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from llmdpd.utils.legacy import leaves
from llmdpd.utils.plain import former_names, to_plain
from llmdpd.utils.registry import Registry

if TYPE_CHECKING:
    from llmdpd.methods.base import Learner

METHODS: Registry[type[Learner]] = Registry(
    "method",
    "llmdpd.methods",
    {
        "llmdpd": "llmdpd.methods.llmdpd.method:LLMDPD",
        "trajectory-diffusion": "llmdpd.methods.trajectory_diffusion:TrajectoryDiffusion",
        "diffusion-ql": "llmdpd.methods.diffusion_ql:DiffusionQL",
        "diffusion-bc": "llmdpd.methods.diffusion_bc:DiffusionBC",
        "bc": "llmdpd.methods.bc:BC",
        "td3-bc": "llmdpd.methods.td3_bc:TD3BC",
        "rad": "llmdpd.methods.td3_bc:RAD",
        "s4rl": "llmdpd.methods.td3_bc:S4RL",
        "cql": "llmdpd.methods.cql:CQL",
        "ads": "llmdpd.methods.ads:ADS",
        "rd": "llmdpd.methods.rd:RD",
        "pnf": "llmdpd.methods.pnf:PnF",
        "otto": "llmdpd.methods.otto:OTTO",
        "dt": "llmdpd.methods.decision_transformer:DT",
        "prompt-dt": "llmdpd.methods.decision_transformer:PromptDT",
        "mtdiff": "llmdpd.methods.mtdiff:MTDiff",
        "lamo": "llmdpd.methods.lamo.method:LaMo",
        "sac": "llmdpd.methods.sac:SAC",
    },
)
"""The methods by name; an installed package adds its own by an entry point of this group, or by `register`."""


@cache
def legacy_fields() -> tuple[tuple[Mapping[str, str], frozenset[str], Mapping[str, str]], ...]:
    """Of every method its sections in version 0.1, its fields now, and the names that they had in between.

    As `llmdpd.utils.legacy.upgraded` asks for them.
    """
    configs = [METHODS[name].Config() for name in METHODS]
    return tuple(
        (c.legacy, frozenset(name for name, _ in leaves({"method": to_plain(c)})), former_names(c, "method."))
        for c in configs
    )
