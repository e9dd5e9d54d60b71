"""The context in C++ against the one in PyTorch: every feature, every switch, every instruction set."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.nn.context import Context, ContextConfig, EncodedPrompts, Keep, RetrievalConfig, make_context
from llmdpd.nn.context.native import read_features
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import native
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.metaworld.layout import LAYOUT

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

D = 9
ENCODER = TrajectoryEncoderConfig(layers=1, width=12, inner=16, steps=40, dropout=0.0)
SIZES = RetrievalConfig(layers=2, heads=3, width=21, lookahead=(0, 2))
FLAT = Layout(
    (Point("tip", (0, 1), (7, 8)), Point("cube", (2, 3)), Point("hole", (9, 4))), goal="hole", gripper=(5,),
    scalars=(6, 10), unit=0.3,
)  # fmt: skip
BARE = Layout((Point("a", (2, 0, 1)), Point("b", (3, 5, 4))), up=1)
LAYOUTS = {"metaworld": (39, 4, LAYOUT), "flat": (11, 2, FLAT), "bare": (6, 3, BARE), "none": (5, 1, None)}


def made(name: str, kind: FeatureKind, config: ContextConfig) -> Context:
    """A context of such observations, with random weights and statistics."""
    S, A, layout = LAYOUTS[name]
    context = make_context(Spaces(S, A, D, layout), dataclasses.replace(config, features=kind)).eval()
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(context, "likeness"):
            context.likeness -= (
                3  # random moments are far apart: their scores would be in the thousands, and rounded so
            )
    context.features.fit(torch.randn(60, S) * 0.3 + 0.1)
    return context.requires_grad_(False)


def observations(rng: np.random.Generator, count: int, name: str) -> np.ndarray:
    """Of real scenes' size, a third of them with absent points."""
    S, _, layout = LAYOUTS[name]
    states = rng.normal(0, 0.3, (count, S)).astype(np.float32)
    if layout is not None:
        for row in range(0, count, 3):
            states[row, list(layout.points[int(rng.integers(len(layout.points)))].at)] = 0.0
    return states


def encoded(rng: np.random.Generator, context: Context, name: str, lengths: tuple[int, ...], **options: Any) -> Any:
    A = LAYOUTS[name][1]
    pairs = [(observations(rng, n, name), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths]
    counts = options.pop("counts", ())
    text = torch.randn(len(counts) or len(lengths) or 1, D) if context.config.text else None
    return context.encode(text, make_tokens(pairs, ENCODER, counts=counts) if lengths else None, **options)


def exact(prompts: EncodedPrompts) -> EncodedPrompts:
    return EncodedPrompts(prompts.pooled.double(), {name: part.double() for name, part in prompts.memory.items()})


def check(
    rng: np.random.Generator, context: Context, prompts: EncodedPrompts, name: str, rows: int, tolerance: float = 2e-5
) -> None:
    """Against float64: sampler.md's tolerance of float32 holds for what the chain begins with, too."""
    states, times = observations(rng, rows, name), rng.integers(0, 500, rows)
    index = rng.integers(0, len(prompts), rows) if len(prompts) > 1 else None
    found = np.full((rows, context.state_dim), np.nan, np.float32)
    packed = context.packed(prompts)
    assert packed is not None
    packed.condition(states, times, index, found, 1)
    where = torch.from_numpy(index) if index is not None else torch.zeros(rows, dtype=torch.int64)
    expected = (
        copy.deepcopy(context)
        .double()
        .condition(torch.from_numpy(states).double(), exact(prompts), where, torch.from_numpy(times))
    )
    error = np.linalg.norm(found - expected.state.numpy())
    assert error <= tolerance * np.linalg.norm(expected.state.numpy())
    # No single number is further away than PyTorch's own rounding may bring it.
    theirs = context.condition(torch.from_numpy(states), prompts, where, torch.from_numpy(times)).state
    rounding = float((theirs.double() - expected.state).abs().max())
    np.testing.assert_allclose(found, expected.state.numpy(), rtol=2e-4, atol=max(2e-4, 3 * rounding))
    for threads in (2, 5):  # and each row alone: the same bits
        again = np.empty_like(found)
        packed.condition(states, times, index, again, threads)
        assert np.array_equal(again, found)
    for row in range(0, rows, 7):
        alone, own = np.empty_like(found[:1]), None if index is None else index[row : row + 1]
        packed.condition(states[row : row + 1], times[row : row + 1], own, alone, 1)
        assert np.array_equal(alone[0], found[row])


RETRIEVAL = ContextConfig(
    "retrieval", text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER, retrieval=SIZES, trajectory_dropout=0.1
)


KINDS: list[FeatureKind] = ["normalised", "raw", "combined", "relative"]
CASES = [(name, kind) for name, (_, _, layout) in LAYOUTS.items() for kind in (KINDS if layout else KINDS[:2])]


@pytest.mark.parametrize("rows", [1, 2, 29])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_feature_of_every_layout(rng: np.random.Generator, name: str, kind: FeatureKind, rows: int) -> None:
    for config in (RETRIEVAL, dataclasses.replace(RETRIEVAL, kind="pooled")):
        context = made(name, kind, config)
        check(rng, context, encoded(rng, context, name, (4, 30, 17)), name, rows)


@pytest.mark.parametrize("rows", [0, 1, 29, 200])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_features_and_geometry_by_themselves(
    rng: np.random.Generator, isa: str, name: str, kind: FeatureKind, rows: int
) -> None:
    features, states = made(name, kind, RETRIEVAL).features, observations(rng, rows, name)
    exact, expected = copy.deepcopy(features).double(), torch.from_numpy(states).double()
    found = read_features(features, states)
    for one, other in zip(found, (exact(expected), exact.geometry(expected)), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=2e-4, atol=2e-5)
    for threads in (2, 5):
        native.set_threads(threads)
        assert all(map(np.array_equal, read_features(features, states), found))
    native.set_threads(None)


SWITCHED: list[dict[str, Any]] = [
    {},
    {"attention": False},
    {"waypoints": False},
    {"geometric_similarity": False},
    {"timestep_embedding": False},
    {"attention": False, "waypoints": False},
    {"layers": 3, "heads": 1, "width": 16},
    {"layers": 1, "heads": 8, "width": 8, "lookahead": (0, 1, 5)},
    {"heads": 5, "width": 160, "lookahead": (3,)},
]


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("switched", SWITCHED, ids=str)
def test_every_part_can_be_switched(rng: np.random.Generator, isa: str, switched: dict[str, Any], text: bool) -> None:
    sizes = dataclasses.replace(SIZES, **switched)
    context = made("metaworld", "relative", dataclasses.replace(RETRIEVAL, retrieval=sizes, text=text))
    check(rng, context, encoded(rng, context, "metaworld", (9, 40)), "metaworld", 26)


def test_prompts_of_one_of_many_and_of_no_demonstration(rng: np.random.Generator) -> None:
    context = made("flat", "relative", RETRIEVAL)
    check(rng, context, encoded(rng, context, "flat", (1,)), "flat", 5)
    check(rng, context, encoded(rng, context, "flat", ()), "flat", 5)
    several = encoded(rng, context, "flat", (9, 30, 4, 12), counts=(3, 1))
    check(rng, context, several, "flat", 20)
    left_out = encoded(rng, context, "flat", (9, 12), keep=Keep(trajectory=torch.tensor([[0.0], [1.0]])))
    check(rng, context, left_out, "flat", 20)


def test_demonstrations_of_thousands_of_steps(rng: np.random.Generator) -> None:
    long = dataclasses.replace(ENCODER, steps=4096, sampling="all")
    context = made("flat", "relative", dataclasses.replace(RETRIEVAL, encoder=long))
    pair = observations(rng, 4096, "flat"), rng.normal(size=(4096, 2)).astype(np.float32)
    check(rng, context, context.encode(torch.randn(1, D), make_tokens([pair], long)), "flat", 3)


def test_it_is_a_copy(rng: np.random.Generator) -> None:
    context = made("flat", "relative", RETRIEVAL)
    prompts = encoded(rng, context, "flat", (9,))
    packed = context.packed(prompts)
    assert packed is not None
    states, times = observations(rng, 4, "flat"), np.arange(4)
    before, after = np.empty((2, 4, context.state_dim), np.float32)
    packed.condition(states, times, None, before, 1)
    for tensor in [*context.state_dict().values(), prompts.pooled, *prompts.memory.values()]:
        tensor.fill_(0.5)
    packed.condition(states, times, None, after, 1)
    assert np.array_equal(before, after)
