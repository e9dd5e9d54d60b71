"""The options for acting: sampler coefficients, action horizon, and the values that are refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig
from llmdpd.nn.acting import ActingConfig, BestOfN, ChainActing, NoisyActing
from llmdpd.nn.context import ContextConfig
from llmdpd.utils.bounds import check_config
from llmdpd.utils.plain import from_plain, to_plain

NETWORK = DiffusionNetworkConfig(diffusion_steps=9, schedule="cosine", action_bound=0.5, chunk=4)


def test_defaults_are_diffusion_qls() -> None:
    config = BestOfN()
    assert (config.samples, config.selection, config.temperature, config.noise_scale) == (50, "soft", 1.0, 1.0)
    assert NoisyActing().noise_scale == 0


def test_coefficients_follow_the_network_and_the_options() -> None:
    found = ChainActing(noise_scale=0.3).coefficients(NETWORK)
    assert (found.name, found.steps, found.train_steps, found.schedule, found.clip) == ("ddpm", 9, 9, "cosine", 0.5)
    assert found.start == 0.3
    found = BestOfN(sampler="dpm++2m", steps=4).coefficients(NETWORK)
    assert (found.name, found.steps, found.train_steps) == ("dpm++2m", 4, 9)


def test_the_action_horizon_is_the_chunk_unless_it_is_given() -> None:
    assert [BestOfN(action_horizon=given).horizon(NETWORK) for given in (None, 1, 3, 4)] == [4, 1, 3, 4]
    assert [kind().horizon(NETWORK) for kind in (ActingConfig, NoisyActing, ChainActing)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("acting", "described"),
    [
        (ActingConfig(), {}),
        (NoisyActing(0.5), {"noise_scale": 0.5}),
        (ChainActing(0.5, "ddim", 3), {"noise_scale": 0.5, "sampler": "ddim", "steps": 3}),
        (
            BestOfN(
                samples=3,
                selection="max",
                temperature=2.0,
                precision="bf16",
                action_horizon=2,
                contradicted_text="drop",
                track_after=1.5,
            ),
            {
                **{"contradicted_text": "keep", "track_after": 1.5},  # of chunks, no text is dropped
                **{"samples": 3, "selection": "max", "temperature": 2.0, "precision": "bf16", "action_horizon": 2},
                **{"noise_scale": 1.0, "sampler": "ddpm", "steps": 9},
            },
        ),
    ],
)
def test_results_record_every_option(acting: ActingConfig, described: dict[str, Any]) -> None:
    none = {"samples": 1, "selection": "soft", "temperature": 1.0, "noise_scale": 0.0, "sampler": "none", "steps": 1}
    assert acting.describe(NETWORK) == {**none, "precision": "fp32", "action_horizon": 1, **described}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("sampler", "euler"),
        ("selection", "best"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("noise_scale", -0.1),
        ("precision", "fp8"),
        ("steps", 0),
        ("action_horizon", 0),
        ("track_after", -1.0),
    ],
)
def test_values_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        check_config(BestOfN(**{field: value}), "acting")
    assert error.value.field == f"acting.{field}"
    assert error.value.found == value or value != value
    assert error.value.expected is not None


def test_numbers_of_numpy_are_kept_as_others_are() -> None:
    acting = BestOfN(samples=np.int64(3), noise_scale=np.float32(0.5), steps=np.uint8(4))  # type: ignore[arg-type]
    check_config(acting, "acting")
    assert type(BestOfN().changed(samples=np.int64(3)).samples) is int
    written = json.loads(json.dumps(to_plain(acting)))
    assert from_plain(BestOfN, written, "policy.json") == BestOfN(samples=3, noise_scale=0.5, steps=4)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_do_or_of_another_type_is_refused(name: str) -> None:
    acting = METHODS[name].Config().acting
    with pytest.raises(InputError, match="unknown way of acting") as error:
        acting.changed(smaples=3)
    assert error.value.field == "acting.smaples"
    for field in fields(acting):
        with pytest.raises(InputError) as error:
            check_config(acting.changed(**{field.name: [3]}), "acting")
        assert error.value.field == f"acting.{field.name}"


@pytest.mark.parametrize(
    ("acting", "field"),
    [
        (ChainActing(steps=4), "steps"),
        (ChainActing(sampler="ddim", steps=10), "steps"),
        (BestOfN(action_horizon=5), "action_horizon"),
    ],
)
def test_options_that_do_not_fit_the_network_are_refused(acting: ChainActing, field: str) -> None:
    with pytest.raises(InputError) as error:
        acting.check_network(NETWORK)
    assert error.value.field == field


def test_results_say_that_texts_are_dropped_where_they_can_be() -> None:
    reads = ContextConfig(text_dropout=0.1)
    for network, dropped in (
        (DiffusionNetworkConfig(context=reads), True),
        (DiffusionNetworkConfig(context=ContextConfig()), False),  # never trained without its text
        (DiffusionNetworkConfig(context=replace(reads, trajectory=False)), False),
        (DiffusionNetworkConfig(context=reads, chunk=4), False),
    ):
        for choice in ("keep", "drop"):
            found = BestOfN(contradicted_text=choice).describe(network)["contradicted_text"]
            assert found == ("drop" if dropped and choice == "drop" else "keep")
    assert BestOfN(contradicted_text="drop", track_after=2).heeding_texts() == BestOfN()
    of_text_alone = DiffusionNetworkConfig(context=replace(reads, trajectory=False))
    assert BestOfN(track_after=2).describe(of_text_alone)["track_after"] == 0, "there is nothing to track"
