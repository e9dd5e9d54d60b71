"""Presets: every one with every method, and there and back through JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.presets import ABLATED, PRESETS, find_preset, with_method
from llmdpd.config.stored import read_stored
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.utils.plain import differences, to_plain

LOCOMOTION = {name for name in PRESETS if name.startswith("d4rl-")}


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_with_every_method_resolves_and_comes_back(method: str) -> None:
    for name in PRESETS:
        config = with_method(PRESETS[name], method)
        resolved = config.resolved()
        assert (resolved.preset, resolved.method.name) == (name, method)
        assert isinstance(resolved.method, METHODS[method].Config)
        for field in ("tasks", "data", "training", "evaluation"):
            assert getattr(config, field) == getattr(PRESETS[name], field), "the method alone is another"
        plain = json.loads(json.dumps(to_plain(resolved), allow_nan=False))
        assert read_stored(plain, Path("config.json")) == resolved


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_resolved_but_for_its_device_folder_and_names(name: str) -> None:
    config, resolved = PRESETS[name], PRESETS[name].resolved()
    changed = {line.split(":")[0] for line in differences(to_plain(config), to_plain(resolved))}
    assert config.preset == name
    assert changed == {"device", "data.root", *(["tasks.seen"] if name in LOCOMOTION else [])}
    assert find_preset(name) is config


def test_ablations_differ_from_their_base_in_one_thing() -> None:
    expected = {
        "no-prompts": {"method.network.context.text", "method.network.context.trajectory"},
        "no-text": {"method.network.context.text"},
        "no-trajectory": {"method.network.context.trajectory"},
        "olmo-1b": {"llm"},
    }
    for name, base in ABLATED.items():
        found = differences(to_plain(PRESETS[base]), to_plain(PRESETS[name]))
        fields, ending = {line.split(":")[0] for line in found} - {"preset"}, name.removeprefix(f"{base}-")
        if ending == "trajectory-diffusion":
            assert all(field.startswith("method.") for field in fields)
            assert PRESETS[name].method.name == ending
        else:
            assert fields == expected[ending], name


def test_names_that_there_are_not() -> None:
    for call, field, near in (
        (lambda: find_preset("smok"), "--preset", "smoke"),
        (lambda: with_method(PRESETS["smoke"], "td3_bc"), "--method", "td3-bc"),
    ):
        with pytest.raises(InputError, match="unknown") as error:
            call()
        assert error.value.field == field
        assert near in str(error.value.hint)


def test_a_method_starts_from_the_preset() -> None:
    """Each row: a method and fields that it takes from the preset's policy diffusion, of the same names."""
    preset: Any = PRESETS["metaworld"]
    for method, fields in {
        "diffusion-ql": ("batch_size", "prompts_per_batch", "network.hidden_dim", "network.context.features"),
        "trajectory-diffusion": ("batch_size", "prompts_per_batch", "lr", "network.context", "clone"),
        "td3-bc": ("batch_size", "network.hidden_dim", "network.context.features"),
        "bc": ("batch_size", "network.hidden_dim", "network.context.features"),
    }.items():
        found: Any = with_method(preset, method).method
        for field in fields:
            one, other = found, preset.method
            for part in field.split("."):
                one, other = getattr(one, part), getattr(other, part)
            assert one == other, (method, field)
