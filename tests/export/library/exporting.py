"""Policies of every kind that can be exported, and the exported library as Python calls it."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmdpd.export.amalgamation import HEADER, SOURCE, amalgamated, sources
from llmdpd.export.contents import Prompt
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig, RetrievalConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point

D = 6
ENCODER = TrajectoryEncoderConfig(layers=1, width=12, inner=16, steps=9, dropout=0.0)
RETRIEVAL = RetrievalConfig(layers=2, heads=3, width=21, lookahead=(0, 2))
CONTEXT = ContextConfig(
    "retrieval", text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER, retrieval=RETRIEVAL, text_dropout=0.1,
    trajectory_dropout=0.1,
)  # fmt: skip
FLAT = Layout(
    (Point("tip", (0, 1), (7, 8)), Point("cube", (2, 3)), Point("hole", (9, 4))), goal="hole", gripper=(5,),
    scalars=(6, 10), unit=0.3,
)  # fmt: skip
SCENE = Layout(
    (Point("hand", (2, 0, 1)), Point("block", (3, 4, 5)), Point("target", (6, 7, 8))), goal="target", gripper=(9, 10),
    move=(0, 3, 1), grip=(2,), up=2, unit=0.5, velocities=("hand",),
)  # fmt: skip
"""One that can be tracked, of 11 numbers of an observation and 5 of an action."""
TRACKED = {
    "state_dim": 14, "action_dim": 5, "layout": SCENE.completed(11)[0], "remembered": SCENE.completed(11)[1],
    "action_low": (-1.0, -2.0, -1.0, -1.0, -0.5), "action_high": (1.0, 2.0, 1.0, 1.0, 0.7),
}  # fmt: skip
BOUNDS = {"action_low": (-2.0, 0.5, -1.0), "action_high": (3.0, 0.9, 1.0), "highest": (2.5, 9.0, 0.8)}
TEXT = "Task: push the puck."


def make_policy(
    spaces: dict[str, Any] | None = None,
    network: dict[str, Any] | None = None,
    acting: dict[str, Any] | None = None,
    **context: Any,
) -> Policy:
    """A policy with random weights; `spaces`, `network`, `acting`: their fields, others: the context's."""
    given = {"state_dim": 7, "action_dim": 3, "embedding_dim": D, **(spaces or {})}
    reads = dataclasses.replace(CONTEXT, **context)
    config = DiffusionNetworkConfig(**{"hidden_dim": 37, "time_dim": 8, "context": reads, **(network or {})})
    net = DiffusionPolicy(Spaces(**given), config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(net.context, "likeness"):
            net.context.likeness -= 3  # random moments are far apart: scores would be in the thousands
    net.context.features.fit(torch.randn(60, net.state_dim) * 0.3 + 0.1)
    acts = BestOfN(**{"samples": 1, **(acting or {})})
    critic = net.make_critic(16, sees_prompts=True) if acts.samples > 1 else None
    texts = {text_key(TEXT): torch.randn(D)}
    return Policy("llmdpd", net, critic, acts, texts=texts, metadata={"trained_on": ["push"]})


def demonstration(rng: np.random.Generator, policy: Policy, length: int = 20) -> tuple[np.ndarray, np.ndarray]:
    spaces = policy.network.spaces
    observations = rng.normal(0, 0.3, (length, spaces.observed_dim)).astype(np.float32)
    actions = policy.network.action_scaling.from_unit(
        rng.uniform(-1, 1, (length, spaces.action_dim)).astype(np.float32)
    )
    if spaces.layout is not None and spaces.layout.move:  # or there is no way to track
        body = list(spaces.layout.body.at)
        way = 0.05 * np.cumsum(actions[:-1, list(spaces.layout.move)], axis=0)
        observations[1:, body] = observations[0, body] + way
    return observations, actions


def prompt_of(rng: np.random.Generator, policy: Policy) -> Prompt:
    """A prompt of all that the policy reads."""
    reads = policy.network.reads
    return Prompt(TEXT if reads.text else None, demonstration(rng, policy) if reads.trajectory else None)


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "pooled": {"kind": "pooled", "features": "combined", "spaces": {"state_dim": 11, "layout": FLAT}},
    "layout": {"features": "relative", "spaces": {"state_dim": 11, "layout": FLAT}},
    "bounds": {"spaces": BOUNDS, "network": {"hidden_dim": 64}},
    "remembered": {"spaces": {"state_dim": 9, "remembered": (4, 1)}},
    "chunk": {
        "network": {"chunk": 4},
        "acting": {"action_horizon": 3},
        "spaces": {"state_dim": 9, "remembered": (0, 2)},
    },
    "tracked": {"spaces": TRACKED, "acting": {"track_after": 0.15}},
    "soft": {"acting": {"samples": 7, "temperature": 0.1}},
    "max": {"acting": {"samples": 5, "selection": "max"}},
    "ddim": {"acting": {"sampler": "ddim", "steps": 3, "noise_scale": 0.3}, "network": {"schedule": "cosine"}},
    "dpm": {"acting": {"sampler": "dpm++2m", "steps": 4}},
    "no text": {"text": False},
    "no demonstration": {"trajectory": False},
    "no prompt": {"kind": "pooled", "text": False, "trajectory": False},
    "attention": {"retrieval": dataclasses.replace(RETRIEVAL, waypoints=False)},
    "waypoints": {"retrieval": dataclasses.replace(RETRIEVAL, attention=False, timestep_embedding=False)},
    "keys alone": {"retrieval": dataclasses.replace(RETRIEVAL, geometric_similarity=False)},
    "wide": {"features": "raw", "spaces": {"state_dim": 40, "action_dim": 17}},
}


class Library:
    """The C interface of an exported policy; errors become `RefusedError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.llmdpd_message.restype = ctypes.c_char_p
        self.c.llmdpd_instruction_set.restype = ctypes.c_char_p
        for name in ("observation_size", "action_size"):
            getattr(self.c, f"llmdpd_{name}").restype = ctypes.c_size_t

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.c, f"llmdpd_{name}")(*arguments)
        if code:
            raise RefusedError(code, self.c.llmdpd_message().decode())

    def policy(self, source: Path | bytes, prompt: Path | bytes | None = None) -> Acting:
        acting = Acting(self, source)
        if prompt is not None:
            acting.prompt(prompt)
        return acting


class RefusedError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class Acting:
    """A policy of the library, used as `Session` is."""

    def __init__(self, library: Library, source: Path | bytes) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        if isinstance(source, bytes):
            library.call("create_from_memory", source, ctypes.c_size_t(len(source)), ctypes.byref(self.handle))
        else:
            library.call("create", str(source).encode(), ctypes.byref(self.handle))

    def __del__(self) -> None:
        self.library.c.llmdpd_destroy(self.handle)

    def prompt(self, source: Path | bytes) -> None:
        if isinstance(source, bytes):
            self.library.call("set_prompt_from_memory", self.handle, source, ctypes.c_size_t(len(source)))
        else:
            self.library.call("set_prompt", self.handle, str(source).encode())

    def seed(self, seed: int) -> None:
        self.library.call("seed", self.handle, ctypes.c_uint64(seed))

    def reset(self, row: int | None = None) -> None:
        if row is None:
            self.library.call("reset", self.handle)
        else:
            self.library.call("reset_row", self.handle, ctypes.c_size_t(row))

    def set_step(self, row: int, step: int) -> None:
        self.library.call("set_step", self.handle, ctypes.c_size_t(row), ctypes.c_int64(step))

    def act(self, observations: np.ndarray) -> np.ndarray:
        given = np.ascontiguousarray(np.atleast_2d(observations), np.float32)
        actions = np.full((len(given), self.library.c.llmdpd_action_size(self.handle)), np.nan, np.float32)
        pointer = ctypes.POINTER(ctypes.c_float)
        rows = ctypes.c_size_t(len(given))
        self.library.call("act", self.handle, given.ctypes.data_as(pointer), rows, actions.ctypes.data_as(pointer))
        return actions if observations.ndim == 2 else actions[0]


def built(compiler: str, folder: Path, *flags: str) -> Path:
    (folder / SOURCE).write_text(amalgamated(sources()))
    shutil.copy(sources() / "export" / HEADER, folder)
    path = folder / "library.so"
    fixed = (
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wno-psabi",
    )
    subprocess.run([compiler, *fixed, *flags, "-o", path, folder / SOURCE], check=True, timeout=600)
    return path
