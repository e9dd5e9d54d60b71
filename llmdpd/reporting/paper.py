"""Figures reported by the paper (arXiv 2509.00347), shown beside ours and never mixed into them."""

from __future__ import annotations

from dataclasses import dataclass

from llmdpd.envs import base_name


@dataclass(frozen=True)
class Reported:
    """A mean over the paper's runs, and the standard deviation over them where the paper gives one."""

    mean: float
    std: float | None = None
    decimals: int = 2

    def __str__(self) -> str:
        parts = [self.mean] if self.std is None else [self.mean, self.std]
        return " ± ".join(f"{part:.{self.decimals}f}" for part in parts)


@dataclass(frozen=True)
class PaperRow:
    """One task of the paper: its own method, the method it is compared with, and whether it calls the task unseen."""

    split: str
    llmdpd: Reported
    baseline: Reported


# Table 1: Meta-World V2, success in percent, 500 episodes, three runs. The baseline column is MTDIFF.
TABLE_1 = {
    "box-close": PaperRow("unseen", Reported(75.24, 4.90), Reported(65.73)),
    "hand-insert": PaperRow("unseen", Reported(78.71, 5.33), Reported(70.87)),
    "bin-picking": PaperRow("unseen", Reported(74.65, 6.28), Reported(55.73)),
    "sweep-into": PaperRow("seen", Reported(91.84, 2.42), Reported(92.87)),
    "coffee-push": PaperRow("seen", Reported(76.56, 2.89), Reported(74.67)),
    "disassemble": PaperRow("seen", Reported(72.30, 6.48), Reported(69.00)),
}

# Table 2: D4RL medium-replay, normalised score. The baseline column is Diffusion-QL.
TABLE_2 = {
    "halfcheetah": PaperRow("seen", Reported(57.3, 3.6, decimals=1), Reported(47.8, decimals=1)),
    "hopper": PaperRow("seen", Reported(105.9, 1.5, decimals=1), Reported(101.3, decimals=1)),
    "walker2d": PaperRow("seen", Reported(102.2, 0.8, decimals=1), Reported(95.5, decimals=1)),
}


def success_row(task: str) -> PaperRow | None:
    """The paper's table 1 for a Meta-World task name of any version ("box-close", "box-close-v3"), if it is there."""
    return TABLE_1.get(base_name(task.lower()))


def locomotion_row(task: str) -> PaperRow | None:
    """The paper's table 2 for a locomotion name ("HalfCheetah-v5", "hopper-medium-replay-v2"), if it is there."""
    return TABLE_2.get(task.lower().split("-")[0])
