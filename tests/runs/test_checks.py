from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from llmdpd.config.schema import PRESETS, TrainConfig
from llmdpd.errors import InputError
from llmdpd.runs.checks import check_values
from llmdpd.runs.pipeline import prepare_config
from llmdpd.tasks.specs import canonical_task
from llmdpd.utils.bounds import LIMITS, check_limits


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_pass(preset: str) -> None:
    config = prepare_config(PRESETS[preset])
    data = dataclasses.replace(config.data, root="data")  # an absolute path by now
    names = tuple(canonical_task(name) for name in PRESETS[preset].tasks.seen)
    assert config.tasks.seen == names
    tasks = dataclasses.replace(config.tasks, seen=PRESETS[preset].tasks.seen)
    assert dataclasses.replace(config, data=data, tasks=tasks) == PRESETS[preset]


def test_names_are_made_canonical_and_counted_once() -> None:
    tasks = dataclasses.replace(PRESETS["smoke"].tasks, seen=("reach", "push-v2", "reach-v3"), unseen=())
    config = prepare_config(dataclasses.replace(PRESETS["smoke"], tasks=tasks))
    assert config.tasks.seen == ("reach-v3", "push-v3")


def _changed(config: Any, name: str, value: object) -> Any:
    part, _, rest = name.partition(".")
    return dataclasses.replace(config, **{part: _changed(getattr(config, part), rest, value) if rest else value})


def _with(name: str, value: object) -> TrainConfig:
    config: TrainConfig = _changed(PRESETS["smoke"], name, value)
    return config


def _numbers(config: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields that hold numbers, by their annotation."""
    names = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names |= _numbers(value, f"{prefix}{field.name}.")
        elif re.match(r"(int|float)\b", str(field.type)):
            names.add(prefix + field.name)
    return names


def test_every_number_has_an_interval() -> None:
    assert set(LIMITS) == _numbers(TrainConfig())


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_out_of_its_interval_is_named(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low - 1, math.nextafter(low, -math.inf), math.nan, math.inf, -math.inf, *([high + 1] * (high < 1e9))):
        with pytest.raises(InputError) as error:
            check_values(_with(name, value))
        assert error.value.field == name
        assert error.value.found is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy.context.encoder.dropout", 2.0),
        ("policy.context.encoder.steps", 0),
        ("policy.context.encoder.layers", 0),
        ("policy.context.encoder.width", 0),
        ("policy.context.encoder.heads", 0),
        ("policy.context.encoder.heads", 3),
        ("policy.context.text_dropout", 3.0),
        ("policy.context.text_dim", 0),
        ("policy.context.text_dim", -1),
        ("policy.time_dim", 3),
        ("agent.tau", 5.0),
        ("agent.gamma", 2.0),
        ("agent.ema_decay", 2.0),
        ("agent.eta", -1.0),
        ("agent.lr", math.nan),
        ("agent.lr", -1e-09),
        ("agent.lr_final", -3.0),
        ("agent.lr_warmup", -5),
        ("data.noise", "foo"),
        ("data.noise", "clean:-1"),
        ("evaluation.max_steps", 900),
    ],
)
def test_what_no_run_can_use_is_named(name: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        check_values(_with(name, value))
    assert error.value.field == name
    assert str(value) in str(error.value.found)


def test_bounds_themselves_and_none_pass() -> None:
    for name in ("training.select_every", "agent.lr", "agent.grad_clip"):
        check_values(_with(name, 0))
    check_values(_with("agent.gamma", 1.0))
    check_values(_with("data.workers", None))
    check_limits(PRESETS["smoke"], {"seed": (0, 0)})
    with pytest.raises(InputError) as error:
        check_limits(PRESETS["smoke"], {"seed": (1, 3)}, path="some/file")
    assert (error.value.expected, error.value.path) == ("1 to 3", "some/file")


def test_cloning_alone_acts_by_one_sample() -> None:
    config = _with("agent.eta", 0.0)
    many = dataclasses.replace(config, acting=dataclasses.replace(config.acting, samples=2))
    with pytest.raises(InputError, match="no critic"):
        check_values(many)
    check_values(dataclasses.replace(config, acting=dataclasses.replace(config.acting, samples=1)))


@pytest.mark.parametrize(
    ("field", "value"), [("training.augmentation.turn", 0.0), ("training.augmentation.mirror", 0.0), ("method", "bc")]
)
def test_views_are_for_policies_that_learn_from_turned_scenes(field: str, value: object) -> None:
    viewed = _with("acting.views", 8)
    check_values(viewed)
    wrong = _changed(viewed, field, value)
    with pytest.raises(InputError, match="learns from such scenes") as caught:
        check_values(wrong)
    assert caught.value.field == "acting.views"
    assert field in str(caught.value.found)
    if field != "method":
        check_values(_changed(wrong, "acting.views", 1))
    if field == "training.augmentation.turn":
        check_values(_changed(wrong, "acting.views", 2))  # mirrored alone
        # Nothing is turned where nothing is told by an example: no views either.
        check_values(_changed(wrong, "policy.context.trajectory", False))


def test_trajectory_diffusion_is_told_which_preset_fits() -> None:
    with pytest.raises(InputError) as caught:
        check_values(_changed(PRESETS["metaworld"], "method", "trajectory-diffusion"))
    assert "--preset metaworld-trajectory-diffusion" in str(caught.value.hint)
    check_values(PRESETS["metaworld-trajectory-diffusion"])


def test_views_need_features_that_leave_out_how_things_are_turned() -> None:
    still = _changed(_changed(PRESETS["smoke"], "training.augmentation.turn", 0.0), "training.augmentation.mirror", 0.0)
    with pytest.raises(InputError, match="learns from such scenes") as caught:
        check_values(_changed(_changed(still, "policy.context.features", "metaworld"), "acting.views", 8))
    assert "features metaworld" in str(caught.value.found)


@pytest.mark.parametrize(("name", "value"), [("turn", 0.5), ("mirror", 0.5), ("gripper", 0.3)])
def test_plans_are_not_trained_on_scenes_beyond_the_range_of_the_data(name: str, value: float) -> None:
    preset = PRESETS["metaworld-trajectory-diffusion"]
    assert preset.training.augmentation.offset, "shifts alone are taken"
    with pytest.raises(InputError, match="range of the data") as caught:
        prepare_config(_changed(preset, f"training.augmentation.{name}", value))
    assert caught.value.field == f"training.augmentation.{name}"


def test_training_on_the_cpu_without_the_compiled_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdpd.ops.native.available", lambda: (False, "no module; pip install ."))
    with pytest.raises(InputError, match="C\\+\\+ module") as caught:
        prepare_config(PRESETS["smoke"])
    assert "pip install" in str(caught.value.found)
