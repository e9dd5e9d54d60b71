from __future__ import annotations

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.features import FeatureKind, StateFeatures
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.metaworld.layout import LAYOUT

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_normalised_by_the_given_data_alone(rng: np.random.Generator) -> None:
    features = StateFeatures(3)
    data = torch.from_numpy(rng.normal([5, -2, 0.1], [3, 0.5, 1e-3], (400, 3)).astype(np.float32))
    features.fit(data)
    np.testing.assert_allclose(features.mean, data.double().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features.std, data.double().numpy().std(0), rtol=1e-3)
    before = features.mean.clone(), features.std.clone()
    other = features(torch.from_numpy(rng.normal(50, 1, (7, 3)).astype(np.float32)))  # another task's states
    assert torch.equal(features.mean, before[0])
    assert torch.equal(features.std, before[1])
    assert other.abs().max() == 10  # held at ten standard deviations
    normal = features(data)
    assert float(normal.mean(0).abs().max()) < 1e-2
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-2)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("count", [7, 1000, 200_003])
@pytest.mark.parametrize("value", [0.0, 0.6, -123.456, 3333.3, 5e5])
def test_a_constant_dimension_keeps_its_scale(rng: np.random.Generator, value: float, count: int, width: int) -> None:
    """Also where float32 cannot compute the mean of equal numbers exactly, which then look as if they varied."""
    data = torch.from_numpy(rng.normal(0, 2, (count, width)).astype(np.float32))
    data[:, -1] = value
    features = StateFeatures(width)
    features.fit(data)
    assert float(features.std[-1]) == 1
    assert float(features.mean[-1]) == float(data[0, -1])
    expected = data.double().std(0, correction=0)[:-1]
    np.testing.assert_allclose(features.std[:-1], expected, rtol=1e-3)  # the others are not widened
    moved = data[:1].clone()
    moved[0, -1] += 0.5
    assert float(features(moved)[0, -1]) == pytest.approx(0.5, abs=1e-3)


def test_raw_features_are_the_observation_and_so_are_others_before_a_fit(rng: np.random.Generator) -> None:
    small = torch.tensor([[0.5, -3.0, 9.0]])
    assert torch.equal(StateFeatures(3)(small), small)
    features = StateFeatures(5, "raw")
    state = torch.from_numpy(rng.normal(0, 100, (4, 5)).astype(np.float32))
    features.fit(state)
    assert torch.equal(features(state), state)
    assert torch.equal(features.geometry(state), state)
    assert (features.output_dim, features.geometry_dim) == (5, 5)


def test_metaworld_numbers_by_hand() -> None:
    """One made observation: hand, gripper, object, second object, the previous frame, the goal."""
    state = torch.zeros(39)
    state[0:3] = torch.tensor([0.1, 0.6, 0.2])  # hand
    state[3] = 0.9  # gripper
    state[4:7] = torch.tensor([0.15, 0.7, 0.02])  # object
    state[7:11] = torch.tensor([0.5, 0.5, 0.5, 0.5])
    state[11:14] = torch.tensor([-0.1, 0.8, 0.04])  # second object
    state[18:21] = torch.tensor([0.09, 0.6, 0.21])  # hand, one step before
    state[22:25] = torch.tensor([0.15, 0.69, 0.02])  # object, one step before
    state[36:39] = torch.tensor([0.0, 0.9, 0.3])  # goal
    out = StateFeatures(39, "combined", LAYOUT)(state)
    relative = [
        *(0.05, 0.1, -0.18),  # object - hand
        *(-0.2, 0.2, -0.16),  # second - hand
        *(-0.1, 0.3, 0.1),  # goal - hand
        *(-0.15, 0.2, 0.28),  # goal - object
        *(-0.25, 0.1, 0.02),  # second - object
    ]
    velocity = [1.0, 0.0, -1.0, 0.0, 1.0, 0.0]  # hundredths
    assert torch.equal(out[:39], state)
    np.testing.assert_allclose(out[39:54], 4 * np.array(relative), atol=1e-6)
    np.testing.assert_allclose(out[54:69], np.tanh(25 * np.array(relative)), atol=1e-5)
    np.testing.assert_allclose(out[69:], velocity, atol=1e-4)
    many = StateFeatures(39, "combined", LAYOUT)(state.expand(2, 5, 39))
    torch.testing.assert_close(many, out.expand(2, 5, 75))  # leading axes are kept


@pytest.mark.parametrize("kind", ["combined", "relative", "metaworld"])
def test_relative_features_need_a_layout(kind: FeatureKind) -> None:
    with pytest.raises(InputError, match="layout") as error:
        StateFeatures(11, kind)
    assert error.value.found == kind
    assert "normalised" in str(error.value.hint)


def test_numbers_of_another_layout_by_hand(rng: np.random.Generator) -> None:
    """Points in a plane, in decimetres: no heights, no goal, one scalar, the body's previous position."""
    layout = Layout(
        (Point("car", (2, 3), (6, 7)), Point("cone", (0, 1))), gripper=(4,), scalars=(5,), unit=0.1, move=(0, 1)
    )
    data = torch.from_numpy(rng.normal(3, 2, (300, 9)).astype(np.float32))
    features = StateFeatures(9, "relative", layout)
    features.fit(data)
    state = data[:7]
    scalar = (state[:, 5:6] - data[:, 5].mean()) / data[:, 5].std(correction=0)
    away, gone = state[:, 0:2] - state[:, 2:4], state[:, 2:4] - state[:, 6:8]
    expected = [state[:, 4:5], scalar, 0.4 * away, torch.tanh(2.5 * away), 10 * gone]
    torch.testing.assert_close(features(state), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    geometry = torch.cat([0.4 * away, state[:, 4:5], scalar], 1)
    torch.testing.assert_close(features.geometry(state), geometry, rtol=1e-4, atol=1e-5)
    assert (features.output_dim, features.geometry_dim) == (features(state).shape[1], geometry.shape[1])
    absent = state.clone()
    absent[:, :2] = 0
    assert features(absent)[:, 2:6].abs().max() == 0


def test_a_few_glitches_do_not_set_the_scale(rng: np.random.Generator) -> None:
    data = torch.from_numpy(rng.normal([5, -1, 0], [2, 0.1, 1], (4000, 3)).astype(np.float32))
    clean = StateFeatures(3)
    clean.fit(data)
    wrong = data.clone()
    wrong[rng.choice(4000, 3, replace=False), 1] = torch.tensor([1e9, -1e9, 1e4])
    features = StateFeatures(3)
    features.fit(wrong)
    torch.testing.assert_close(features.std, clean.std, rtol=0.1, atol=0)
    torch.testing.assert_close(features.mean, clean.mean, rtol=0, atol=0.02)
    assert torch.equal(features.std[[0, 2]], clean.std[[0, 2]]), "the others are taken as they are"


def test_what_happens_rarely_is_no_glitch() -> None:
    data = torch.zeros(5000, 1)
    data[7] = 1.0
    features = StateFeatures(1)
    features.fit(data)
    assert float(features.std) == pytest.approx(float(data.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kind", ["normalised", "relative", "raw"])
def test_numbers_that_would_be_clipped_are_fitted_anew_and_no_others(
    kind: FeatureKind, device: str, rng: np.random.Generator
) -> None:
    """The data are on the host, wherever the features are."""
    layout = Layout((Point("hand", (0, 1)), Point("thing", (2, 3))), scalars=(4, 5))
    features = StateFeatures(6, kind, layout).to(device)
    old = torch.from_numpy(rng.normal(size=(4000, 6)).astype(np.float32))
    features.fit(old)
    mean, std = features.mean.clone(), features.std.clone()
    new = old.clone()
    new[:, 1] += 50
    new[:, 5] *= 40
    new[:2, 4] = 1e4  # a glitch or two are none of the data's numbers
    chosen = features.fit_beyond(new)
    assert chosen == {"normalised": [1, 5], "relative": [5], "raw": []}[kind]
    kept = [index for index in range(6) if index not in chosen]
    assert torch.equal(features.mean[kept], mean[kept])
    assert torch.equal(features.std[kept], std[kept])
    again = StateFeatures(6, kind, layout).to(device)
    again.fit(new)
    assert torch.equal(features.mean[chosen], again.mean[chosen])
    assert torch.equal(features.std[chosen], again.std[chosen])
    assert features.fit_beyond(new) == []
