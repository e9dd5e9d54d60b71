"""Figures reported by the paper (arXiv 2509.00347), shown beside ours and never mixed into them."""

from __future__ import annotations

from dataclasses import dataclass

from llmdpd.tasks import base_name


@dataclass(frozen=True)
class Reported:
    """A mean over the paper's runs, and the standard deviation over them where the paper gives one."""

    mean: float
    std: float | None = None
    decimals: int = 2

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{self.decimals}f}"
        return f"{self.mean:.{self.decimals}f}{spread}"


@dataclass(frozen=True)
class PaperRow:
    """One task of one of the paper's tables: whether the paper calls it unseen, and its columns by the paper's names.

    `llmdpd` is the paper's own method, `baseline` the one that a page compares with.
    """

    split: str
    columns: dict[str, Reported]
    baseline_name: str

    @property
    def llmdpd(self) -> Reported:
        return self.columns["LLMDPD"]

    @property
    def baseline(self) -> Reported:
        return self.columns[self.baseline_name]


PaperTable = dict[str, PaperRow]


def _table(
    names: tuple[str, ...], baseline: str, rows: dict[str, tuple[str, tuple[float, ...]]], decimals: int
) -> PaperTable:
    """Rows of (split, mean, std, mean, std …) in the order of `names`."""
    return {
        task: PaperRow(
            split,
            {
                name: Reported(mean, std, decimals)
                for name, mean, std in zip(names, figures[::2], figures[1::2], strict=True)
            },
            baseline,
        )
        for task, (split, figures) in rows.items()
    }


# Table 1: Meta-World V2, success in percent, 500 episodes, three runs.
TABLE_1 = _table(
    ("SAC", "S4RL", "RAD", "MTDIFF", "LLMDPD"),
    "MTDIFF",
    {
        "box-close": ("unseen", (23.46, 7.11, 73.13, 3.51, 71.20, 4.84, 65.73, 8.36, 75.24, 4.90)),
        "hand-insert": ("unseen", (30.60, 9.77, 60.20, 1.57, 43.79, 3.44, 70.87, 3.59, 78.71, 5.33)),
        "bin-picking": ("unseen", (42.13, 14.33, 72.20, 4.17, 43.27, 4.38, 55.73, 7.63, 74.65, 6.28)),
        "sweep-into": ("seen", (91.80, 1.14, 90.53, 3.52, 88.06, 9.86, 92.87, 1.11, 91.84, 2.42)),
        "coffee-push": ("seen", (28.60, 14.55, 28.73, 8.44, 33.19, 2.86, 74.67, 6.79, 76.56, 2.89)),
        "disassemble": ("seen", (60.20, 16.29, 52.20, 5.68, 60.93, 20.80, 69.00, 4.72, 72.30, 6.48)),
    },
    decimals=2,
)

# Table 2: D4RL medium-replay, normalised score, three runs.
TABLE_2 = _table(
    ("PnF-Qgrad", "SAORL", "Diffusion-QL", "OTTO", "RD", "ADS", "LLMDPD"),
    "Diffusion-QL",
    {
        "halfcheetah": ("seen", (41.2, 4.5, 40.0, 2.6, 47.8, 0.3, 47.8, 0.2, 57.7, 0.9, 59.4, 3.1, 57.3, 3.6)),
        "hopper": ("seen", (51.6, 15.5, 68.0, 8.8, 101.3, 0.6, 103.8, 0.6, 104.1, 0.8, 105.0, 0.9, 105.9, 1.5)),
        "walker2d": ("seen", (70.4, 2.0, 80.0, 23.0, 95.5, 1.5, 93.6, 2.2, 92.1, 2.7, 96.1, 0.6, 102.2, 0.8)),
    },
    decimals=1,
)

# Table 3: the paper's ablations, success in percent as in table 1; the names in words are this project's.
TABLE_3 = _table(
    ("LLMDPD", "OLMo-1B", "w/o prompts", "w/o z_text", "w/o z_traj", "w/o policy diffusion"),
    "w/o prompts",
    {
        "box-close": ("unseen", (75.24, 4.90, 72.18, 5.66, 67.29, 6.89, 70.14, 8.57, 72.01, 8.37, 70.53, 6.44)),
        "hand-insert": ("unseen", (78.71, 5.33, 76.61, 4.21, 69.31, 5.38, 72.16, 7.93, 75.43, 6.70, 73.19, 6.31)),
        "bin-picking": ("unseen", (74.65, 6.28, 71.76, 6.39, 61.48, 8.85, 64.55, 10.73, 70.13, 8.64, 66.86, 9.59)),
    },
    decimals=2,
)


def find_row(table: PaperTable, task: str) -> PaperRow | None:
    """A table's row for a task's name in any of its spellings ("box-close-v3", "hopper-medium-replay-v2")."""
    name = base_name(task.lower())
    return table.get(name) or table.get(name.split("-")[0])
