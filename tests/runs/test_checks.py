from __future__ import annotations

import dataclasses

import pytest

from llmdpd.config import PRESETS, TrainConfig
from llmdpd.errors import InputError
from llmdpd.runs.checks import check_least, check_values
from llmdpd.runs.pipeline import prepare_config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_pass(preset: str) -> None:
    config = prepare_config(PRESETS[preset])
    assert config.threads is not None
    assert config.threads >= 1
    assert dataclasses.replace(config, threads=None) == PRESETS[preset]


def test_names_are_made_canonical_and_counted_once() -> None:
    tasks = dataclasses.replace(PRESETS["smoke"].tasks, seen=("reach", "push-v2", "reach-v3"), unseen=())
    config = prepare_config(dataclasses.replace(PRESETS["smoke"], tasks=tasks))
    assert config.tasks.seen == ("reach-v3", "push-v3")


def _with(name: str, value: object) -> TrainConfig:
    part, _, field = name.rpartition(".")
    config = PRESETS["smoke"]
    if not part:
        return dataclasses.replace(config, **{field: value})  # type: ignore[arg-type]
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.iterations", 0),
        ("agent.ema_every", 0),
        ("training.select_every", -1),
        ("seed", -1),
        ("threads", 0),
        ("agent.lr", -1e-09),
        ("agent.grad_clip", -1.0),
    ],
)
def test_a_number_too_small_is_named(field: str, value: int) -> None:
    with pytest.raises(InputError) as error:
        check_values(_with(field, value))
    assert error.value.field == field
    assert error.value.found == value


def test_bounds_themselves_and_none_pass() -> None:
    check_values(_with("training.select_every", 0))
    check_values(_with("data.workers", None))
    check_least(PRESETS["smoke"], {"seed": 0})
    with pytest.raises(InputError):
        check_least(PRESETS["smoke"], {"seed": 1})


def test_cloning_alone_acts_by_one_sample() -> None:
    config = _with("agent.eta", 0.0)
    many = dataclasses.replace(config, acting=dataclasses.replace(config.acting, samples=2))
    with pytest.raises(InputError, match="no critic"):
        check_values(many)
    check_values(dataclasses.replace(config, acting=dataclasses.replace(config.acting, samples=1)))
