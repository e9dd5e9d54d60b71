"""How trained policies act: the options that a method's policy has for sampling an action."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from llmdpd.diffusion import SamplerCoefficients, sampler_coefficients
from llmdpd.diffusion.schedules import Precision, SamplerName
from llmdpd.errors import InputError
from llmdpd.nn.config import ChainConfig
from llmdpd.utils.bounds import Bounds, Count, NonNegative

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ActingConfig:
    """Acting without any choice: what a deterministic policy has."""

    def changed(self, **changes: Any) -> Self:
        """The same with other values of some fields, which whoever uses them holds to their bounds.

        Raises:
            InputError: a field that it does not have.
        """
        names = [field.name for field in fields(self)]
        for name, value in changes.items():
            if name not in names:
                expected = " or ".join(names) or "nothing: it acts in one way"
                raise InputError("unknown way of acting", field=f"acting.{name}", found=value, expected=expected)
        return replace(
            self, **{n: value.item() if isinstance(value, np.generic) else value for n, value in changes.items()}
        )

    @property
    def drops_texts(self) -> bool:
        """Whether a text that contradicts its demonstration is left out of the prompt."""
        return False

    @property
    def takes_over(self) -> float:
        """Lengths of the demonstration after which at the latest the tracker takes over from the policy; 0: never."""
        return 0.0

    def heeding_texts(self) -> ActingConfig:
        """The same, with every text kept, and without the tracker, which knows none."""
        return self

    def check_network(self, network: Any) -> None:
        """Raise `InputError` for a way of acting that does not fit the network's configuration."""

    def horizon(self, network: Any) -> int:
        """Actions of each sampled chunk that are executed before the next is sampled."""
        return 1

    def describe(self, network: Any) -> dict[str, Any]:
        """How actions are sampled, as results record it; what has no meaning for the policy is 1, 0 or "none"."""
        return {
            **{"samples": 1, "selection": "soft", "temperature": 1.0, "noise_scale": 0.0, "sampler": "none"},
            **{"steps": 1, "precision": "fp32", "action_horizon": self.horizon(network)},
        }


@dataclass(frozen=True)
class NoisyActing(ActingConfig):
    """Acting by a stochastic policy that names its distribution."""

    noise_scale: NonNegative = 0.0
    """Factor on the standard deviation; 0: the distribution's mode."""

    def describe(self, network: Any) -> dict[str, Any]:
        return super().describe(network) | {"noise_scale": self.noise_scale}


@dataclass(frozen=True)
class ChainActing(NoisyActing):
    """Acting by one walk of a reverse diffusion chain."""

    noise_scale: NonNegative = 1.0
    """Factor on the sampler's noise; below 1 actions come from nearer to the mode."""
    sampler: SamplerName = "ddpm"
    """Sampler of the chain: ddpm, ddim or dpm++2m."""
    steps: Annotated[int | None, Bounds(1)] = None
    """Denoising steps; by default those of training (ddpm needs those)."""

    def coefficients(self, network: ChainConfig) -> SamplerCoefficients:
        """The sampler's coefficients for a network.

        Raises:
            InputError: a number of steps that the sampler cannot take.
        """
        total, bound = network.diffusion_steps, network.action_bound
        steps, noise = total if self.steps is None else self.steps, self.noise_scale
        return sampler_coefficients(self.sampler, steps, network.schedule, bound, train_steps=total, noise_scale=noise)

    def check_network(self, network: ChainConfig) -> None:
        self.coefficients(network)

    def describe(self, network: ChainConfig) -> dict[str, Any]:
        chain = {"sampler": self.sampler, "steps": self.coefficients(network).steps}
        return super().describe(network) | chain


@dataclass(frozen=True)
class BestOfN(ChainActing):
    """Acting by N samples of a diffusion policy, of which the critics choose one. Diffusion-QL takes 50."""

    samples: Count = 50
    """N, actions sampled for a state; 1 needs no critic."""
    selection: Literal["soft", "max"] = "soft"
    """Which of the N is taken: `soft`, by softmax over min(Q_1, Q_2) / temperature, or `max`."""
    temperature: Annotated[float, Bounds(1e-9)] = 1.0
    """Temperature of the softmax, in units of Q; above 0, the limit of which is `max`."""
    precision: Precision = "fp32"
    """Precision of the hidden layers' matrix products: fp32, or bf16 (faster on CPUs and GPUs that have it)."""
    action_horizon: Annotated[int | None, Bounds(1)] = None
    """Actions of a chunk that are executed before the next is sampled; by default the whole chunk."""

    contradicted_text: Literal["keep", "drop"] = "keep"
    """What becomes of a text under which the policy finds its demonstration clearly less likely than without it (the
    diffusion loss on it is 1.1 times as high): `drop` leaves it out of that prompt. It needs text dropout in training,
    and has no effect on a policy that predicts chunks."""
    track_after: NonNegative = 0.0
    """Lengths of the demonstration after which at the latest a hand-written rule that tracks it takes over from the
    policy; earlier where the body stands still for at least 30 steps and 1.5 times the demonstration's longest stand,
    from half a length on; 0: never. It goes on from the most alike moment, and needs a layout with a goal and
    action.move."""

    def check_network(self, network: Any) -> None:
        super().check_network(network)
        self.horizon(network)

    def horizon(self, network: Any) -> int:
        """Actions of each chunk that are executed, 1 … H: the action horizon of Diffusion Policy (Chi et al. 2023).

        Raises:
            InputError: more than a chunk has.
        """
        chunk: int = network.chunk
        if self.action_horizon is not None and self.action_horizon > chunk:
            raise InputError(
                "more actions are to be executed than a chunk has",
                field="action_horizon",
                found=self.action_horizon,
                expected=f"1 to {chunk} (chunk)",
            )
        return chunk if self.action_horizon is None else self.action_horizon

    @property
    def drops_texts(self) -> bool:
        return self.contradicted_text == "drop"

    @property
    def takes_over(self) -> float:
        return self.track_after

    def heeding_texts(self) -> BestOfN:
        return replace(self, contradicted_text="keep", track_after=0.0)

    def describe(self, network: Any) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("samples", "selection", "temperature", "precision")}
        reads = network.context_config()
        dropped = self.drops_texts and network.chunk == 1 and reads.text and reads.trajectory and reads.text_dropout
        tracked = self.track_after if reads.trajectory else 0.0
        return (
            super().describe(network)
            | own
            | {
                "contradicted_text": "drop" if dropped else "keep",
                "track_after": tracked,
            }
        )
