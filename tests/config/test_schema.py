"""The configuration's bounds: every number has some, and each is enforced; fields that do not fit each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS, with_method
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.utils.bounds import Bounds, bounds_of

FREE = {"lookahead"}
"""Numbers without bounds of their own: a `check()` holds them."""


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bounds | None]]:
    """The dotted fields within a configuration: name, type, bounds."""
    hints, bounds = get_type_hints(type(config)), bounds_of(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], bounds.get(field.name)


def changed(config: Any, name: str, value: object) -> Any:
    part, _, rest = name.partition(".")
    return dataclasses.replace(config, **{part: changed(getattr(config, part), rest, value) if rest else value})


@pytest.mark.parametrize("method", METHODS)
def test_every_number_has_bounds_and_is_held_to_them(method: str) -> None:
    config = with_method(PRESETS["smoke"], method)
    config.check_values()
    for name, kind, bounds in leaves(config):
        if not {kind, *get_args(kind)} & {int, float} or name.rpartition(".")[2] in FREE:
            continue
        assert bounds is not None, f"{name} has no bounds"
        below = bounds.low - 1, math.nextafter(bounds.low, -math.inf), math.nan, math.inf, -math.inf
        for value in (*below, *([bounds.high + 1] if bounds.high < 1e9 else [])):
            with pytest.raises(InputError) as error:
                changed(config, name, value).check_values()
            assert (error.value.field, error.value.found) == (name, value) or math.isnan(value)


def test_bounds_themselves_and_none_pass() -> None:
    for name, value in (
        ("training.select_every", 0),
        ("method.lr", 0.0),
        ("method.grad_clip", 0.0),
        ("method.gamma", 1.0),
        ("data.workers", None),
    ):
        changed(PRESETS["smoke"], name, value).check_values()


LLMDPD, PLANS = "llmdpd", "trajectory-diffusion"


@pytest.mark.parametrize(
    ("method", "words", "field", "message"),
    [
        (LLMDPD, ["--method.network.context.encoder.heads", "3"], "method.network.context.encoder.heads", "heads"),
        (LLMDPD, ["--method.network.context.retrieval.heads", "3"], "method.network.context.retrieval.heads", "heads"),
        (LLMDPD, ["--method.network.context.retrieval.lookahead", "-1"], None, "looks ahead"),
        (LLMDPD, ["--method.network.time-dim", "3"], "method.network.time_dim", "sine and cosine"),
        (LLMDPD, ["--method.network.context.features", "raw"], "method.network.context.features", "orientation"),
        (LLMDPD, ["--method.network.chunk", "2"], "method.eta", "clone alone"),
        (LLMDPD, ["--method.eta", "0", "--method.acting.samples", "2"], "method.acting.samples", "no critic"),
        (LLMDPD, ["--method.acting.steps", "3"], "method.acting.steps", "ddpm"),
        (LLMDPD, ["--method.acting.action-horizon", "2"], "method.acting.action_horizon", "more actions"),
        (LLMDPD, ["--method.batch-size", "7"], "method.batch_size", "shared out"),
        (LLMDPD, ["--data.noise", "clean:-1"], "data.noise", "positive number"),
        (LLMDPD, ["--data.noise", "foo"], "data.noise", "unknown behaviour"),
        (LLMDPD, ["--evaluation.max-steps", "900"], "evaluation.max_steps", "out of range"),
        (LLMDPD, ["--cuda-graph", "on"], "training.cuda_graph", "needs a CUDA device"),
        (LLMDPD, ["--device", "tpu"], "device", "no such device"),
        (LLMDPD, ["--tasks"], "tasks.seen", "no task"),
        (LLMDPD, ["--tasks", "reach", "--tasks.unseen", "reach-v3"], "tasks.unseen", "both seen and unseen"),
        (LLMDPD, ["--tasks", "reach", "hopper", "--tasks.unseen"], "tasks", "one policy cannot serve"),
        (LLMDPD, ["--tasks", "hopper", "--tasks.unseen"], "method.augmentation", "whose layout is known"),
        ("diffusion-bc", ["--method.eta", "1"], "method.eta", "clones alone"),
        ("rad", ["--method.states.scale-low", "2"], "method.states.scale_low", "greater"),
        ("dt", ["--method.network.sequence.heads", "3"], "method.network.sequence.heads", "heads"),
        ("mtdiff", ["--method.acting.sampler", "ddpm"], "method.acting.steps", "ddpm"),
        (PLANS, ["--method.augmentation.rotate", "0.5"], "method.augmentation.rotate", "range of the data"),
        (PLANS, ["--method.augmentation.mirror", "0.5"], "method.augmentation.mirror", "range of the data"),
        ("sac", ["--method.network.action-bound", "2"], "method.network.action_bound", "within ±1"),
        ("sac", ["--method.learning-starts", "500"], "method.learning_starts", "before the first gradient step"),
        ("sac", ["--method.max-steps", "900"], "method.max_steps", "out of range"),
    ],
)
def test_fields_that_do_not_fit_are_named(method: str, words: list[str], field: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_train(["--preset", "smoke", "--method", method, *words])
    assert field is None or error.value.field == field


def test_training_on_the_cpu_needs_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmdpd.ops.native.available", lambda: (False, "no module; pip install ."))
    with pytest.raises(InputError, match="C\\+\\+ module") as error:
        PRESETS["smoke"].check_values()
    assert "pip install" in str(error.value.found)


def test_names_are_made_canonical_and_places_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = ["--tasks", "reach", "push-v2", "reach-v3", "--tasks.unseen", "--llm", "model"]
    config = parse_train([*words, "--data.path", "minari:x", "--data.demonstrations", "~/d", "--data.root", "r"])
    assert (config.tasks.seen, config.tasks.unseen) == (("reach-v3", "push-v3"), ())
    assert (config.llm, config.data.path, config.data.root) == (
        str(tmp_path / "model"),
        "minari:x",
        str(tmp_path / "r"),
    )
    assert str(config.data.demonstrations).startswith("/")


def test_texts_are_kept_where_they_are_to_say_something_else_than_the_demonstration() -> None:
    text, usual = (parse_train(words).method.acting for words in (["--protocol", "text"], []))
    assert (text, usual) == (usual.heeding_texts(), PRESETS["metaworld"].method.acting)
    assert text != usual
