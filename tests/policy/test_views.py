"""Acting by several turned and mirrored views of the scene."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.policy.views import seeds_in_views
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.metaworld.layout import FRAME, GOAL, HAND, OBJECT, STATE_DIM
from llmdpd.tasks.metaworld.scene import turned, turned_actions, view_matrices

A, D = 4, 10
TEXTS = ("Task: push the puck.", "Task: reach.")
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
MODE = ActingConfig(samples=1, noise_scale=0.0)


def a_policy(views: int = 8, acting: ActingConfig = MODE, chunk: int = 1, **context: Any) -> Policy:
    """A policy of Meta-World's sizes with random weights."""
    known = {"kind": "retrieval", "features": "relative", "text_dropout": 0.1, "trajectory_dropout": 0.1, **context}
    config = PolicyConfig(hidden_dim=24, chunk=chunk, context=ContextConfig(encoder=ENCODER, **known))
    network = ConditionalPolicy(STATE_DIM, A, D, config)
    texts = {text_key(text): torch.randn(D) for text in TEXTS}
    return Policy(network, None, dataclasses.replace(acting, views=views), texts=texts)


def scenes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Observations [count, 39] on and above the table, without a second object."""
    states = rng.uniform(0, 1, (count, STATE_DIM)).astype(np.float32)
    for start in (0, FRAME):
        for part in (HAND, OBJECT):
            states[:, start + part.start : start + part.stop] = rng.normal((0.0, 0.6, 0.1), 0.2, (count, 3))
        states[:, start + 11 : start + 18] = 0
    states[:, GOAL] = rng.normal((0.0, 0.6, 0.1), 0.2, (count, 3))
    return states


def an_example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return scenes(rng, 20), rng.uniform(-1, 1, (20, A)).astype(np.float32)


def seen(part: np.ndarray, turn: Any, matrix: torch.Tensor) -> np.ndarray:
    return np.asarray(turn(torch.from_numpy(part)[None], matrix[None])[0])


@pytest.mark.parametrize("count", [1, 2, 4, 6, 8, 16])
def test_views_are_different_turns_each_plain_and_mirrored(count: int) -> None:
    matrices = view_matrices(count)
    assert matrices.shape == (count, 2, 2)
    assert torch.equal(matrices[0], torch.eye(2))
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), torch.eye(2).expand(count, 2, 2))
    assert torch.linalg.det(matrices).round().sum() == (1 if count == 1 else 0)
    apart = (matrices[:, None] - matrices).abs().amax((-1, -2)) + torch.eye(count)
    assert apart.min() > 0.1
    if count in (2, 4, 8):  # a robot's right angles stay right angles
        assert set(matrices.flatten().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_turned_scene_is_acted_in_as_before_but_turned(rng: np.random.Generator, chunk: int) -> None:
    policy = a_policy(chunk=chunk)
    example, now = an_example(rng), scenes(rng, 5)
    plain = Policy(policy.network, None, MODE, texts=policy.texts)
    differs = 0.0
    for matrix in view_matrices(8):
        again = (seen(example[0], turned, matrix), seen(example[1], turned_actions, matrix))
        there = seen(now, turned, matrix)
        expected = policy.prompt(TEXTS[0], example).act(now)
        found = policy.prompt(TEXTS[0], again).act(there)
        np.testing.assert_allclose(found, seen(expected, turned_actions, matrix), atol=2e-5)
        one = plain.prompt(TEXTS[0], example).act(now)
        differs = max(
            differs, np.abs(plain.prompt(TEXTS[0], again).act(there) - seen(one, turned_actions, matrix)).max()
        )
    # A network of random weights does not do so by itself.
    assert differs > 1e-2


def test_the_mean_of_what_each_view_does(rng: np.random.Generator) -> None:
    policy = a_policy(4)
    plain = Policy(policy.network, None, MODE, texts=policy.texts)
    example, now = an_example(rng), scenes(rng, 3)
    each = []
    for matrix in view_matrices(4):
        again = (seen(example[0], turned, matrix), seen(example[1], turned_actions, matrix))
        done = plain.prompt(TEXTS[0], again).act(seen(now, turned, matrix))
        each.append(seen(done, turned_actions, matrix.T))
    np.testing.assert_allclose(policy.prompt(TEXTS[0], example).act(now), np.mean(each, axis=0), atol=1e-5)


@pytest.mark.parametrize("kind", ["retrieval", "pooled"])
def test_a_row_depends_on_itself_alone(rng: np.random.Generator, kind: str) -> None:
    policy = a_policy(acting=ActingConfig(samples=1, noise_scale=0.3), kind=kind)
    examples = [an_example(rng), an_example(rng)]
    prompts = policy.encode_prompts(TEXTS, examples)
    assert (prompts.views, len(prompts)) == (8, 16)
    now, index, steps = scenes(rng, 7), rng.integers(2, size=7), rng.integers(50, size=7)
    seeds = rng.integers(-(2**63), 2**63 - 1, size=7)
    whole = policy.act_many(now, prompts, index, steps, seeds)
    some = np.array([4, 1])
    parts = policy.act_many(now[some], prompts, index[some], steps[some], seeds[some])
    np.testing.assert_allclose(parts, whole[some], atol=1e-5)
    # Alone under its prompt, where the views' rows lie in groups.
    alone = policy.encode_prompts(TEXTS[index[4] : index[4] + 1], [examples[index[4]]])
    one = policy.act_many(now[4:5], alone, None, steps[4:5], seeds[4:5])
    np.testing.assert_allclose(one, whole[4:5], atol=1e-5)


def test_the_noise_of_each_view_is_its_own(rng: np.random.Generator) -> None:
    noisy = ActingConfig(samples=1)
    policy = a_policy(4, noisy)
    plain = Policy(policy.network, None, noisy, texts=policy.texts)
    example, now, steps = an_example(rng), scenes(rng, 3), np.zeros(3, np.int64)
    seeds = rng.integers(-(2**63), 2**63 - 1, size=3)
    each = []
    for matrix, own in zip(view_matrices(4), seeds_in_views(seeds, 4).reshape(4, 3), strict=True):
        again = (seen(example[0], turned, matrix), seen(example[1], turned_actions, matrix))
        prompts = plain.encode_prompts(TEXTS[:1], [again])
        done = plain.act_many(seen(now, turned, matrix), prompts, None, steps, own)
        each.append(seen(done, turned_actions, matrix.T))
    prompts = policy.encode_prompts(TEXTS[:1], [example])
    found = policy.act_many(now, prompts, None, steps, seeds)
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-5)


def test_rows_that_do_not_share_out_among_the_prompts(rng: np.random.Generator) -> None:
    policy, three = a_policy(2), np.arange(3)
    prompts = policy.encode_prompts(TEXTS, [an_example(rng), an_example(rng)])
    with pytest.raises(ValueError, match="3 rows do not share out among 2 prompts"):
        policy.act_many(scenes(rng, 3), prompts, None, three, three)
    four = np.arange(4)
    grouped = policy.act_many(scenes(rng, 4), prompts, None, four, four)
    assert grouped.shape == (4, A)


def test_seeds_of_views(rng: np.random.Generator) -> None:
    seeds = rng.integers(-(2**63), 2**63 - 1, size=50)
    spread = seeds_in_views(seeds, 8)
    np.testing.assert_array_equal(spread[:50], seeds)
    assert len(np.unique(spread)) == 400


def test_without_an_example_there_is_one_view(rng: np.random.Generator) -> None:
    policy = a_policy(acting=ActingConfig(samples=1))
    plain = Policy(policy.network, None, ActingConfig(samples=1), texts=policy.texts)
    now = scenes(rng, 4)
    drawn = [p.prompt(TEXTS[0]).act(now) for p in (policy, plain)]
    np.testing.assert_array_equal(*drawn)
    assert policy.encode_prompts(TEXTS, [None, None]).views == 1


def test_where_it_looks_is_told_of_the_scene_as_it_is(rng: np.random.Generator) -> None:
    policy = a_policy()
    plain = Policy(policy.network, None, MODE, texts=policy.texts)
    example, now = an_example(rng), scenes(rng, 6)
    for found, expected in zip(policy.looks(TEXTS[0], example, now), plain.looks(TEXTS[0], example, now), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_views_are_kept_with_the_policy(rng: np.random.Generator, tmp_path: Any) -> None:
    policy, example, now = a_policy(), an_example(rng), scenes(rng, 3)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert loaded.acting.views == 8
    np.testing.assert_array_equal(*(p.prompt(TEXTS[0], example).act(now) for p in (policy, loaded)))


@pytest.mark.parametrize("views", [0, 3, 65])
def test_a_number_of_views_that_there_is_not(views: int) -> None:
    with pytest.raises(InputError) as error:
        ActingConfig(samples=1, views=views)
    assert error.value.field == "acting.views"


def test_features_that_say_how_things_are_turned() -> None:
    with pytest.raises(InputError, match="leave out where and how things are turned") as error:
        a_policy(features="metaworld")
    assert error.value.field == "acting.views"
    assert "metaworld features" in str(error.value)


def test_actions_that_are_not_meta_worlds() -> None:
    context = ContextConfig(features="relative", encoder=ENCODER)
    network = ConditionalPolicy(STATE_DIM, 6, D, PolicyConfig(hidden_dim=24, context=context))
    with pytest.raises(InputError, match="6 action numbers"):
        Policy(network, None, dataclasses.replace(MODE, views=2))
