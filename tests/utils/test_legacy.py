"""Names of version 0.1 as they are now."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.utils.legacy import is_old, leaves, renamed_field, upgraded

SECTIONS = {"agent": "method.", "rad": "method.states."}
DEFAULT: dict[str, Any] = {
    "data": {"demonstrations": None, "path": None},
    "method": {
        "name": "m",
        "lr": 0.1,
        "states": {"kind": "a"},
        "network": {"width": 1, "demonstration": {"steps": 5}},
        "acting": {"action_horizon": None},
    },
}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("agent.lr", "method.lr"),
        ("rad.kind", "method.states.kind"),
        ("agent.tau", None),
        ("data.prompts", "data.demonstrations"),
        ("data.path", "data.path"),
        ("policy.width", "method.network.width"),
        ("policy.context.encoder.steps", "method.network.demonstration.steps"),
        ("policy.context.width", "method.network.width"),
        ("policy.plan.width", None),
        ("acting.replan", "method.acting.action_horizon"),
    ],
)
def test_fields_and_where_they_are_now(old: str, new: str | None) -> None:
    assert renamed_field(old, SECTIONS, [name for name, _ in leaves(DEFAULT)]) == new
    assert is_old(old, SECTIONS) == (old != "data.path")


def others() -> list[tuple[dict[str, str], list[str]]]:
    """Another method, with fields that the one under test does not have."""
    return [({"agent": "method.", "bc": "method."}, ["method.tau", "method.lr"])]


def test_names_that_fields_have_had_since() -> None:
    former = {"method.network.size": "method.network.width", "method.rate": "method.lr"}
    known = [name for name, _ in leaves(DEFAULT)]
    assert renamed_field("policy.size", SECTIONS, known, former) == "method.network.width"
    assert renamed_field("agent.rate", SECTIONS, known, former) == "method.lr"
    assert renamed_field("agent.rate", SECTIONS, [], former) is None
    found = upgraded({"policy": {"size": 3}}, SECTIONS, DEFAULT, others, former)
    assert found["method"]["network"]["width"] == 3


@pytest.mark.parametrize("field", ["agent.tua", "training.iteratons", "data.prompts.more", "bd.lr", "policy.wdth"])
def test_a_field_that_no_method_has_is_named(field: str) -> None:
    plain: Any = 1
    for part in reversed(field.split(".")):
        plain = {part: plain}
    with pytest.raises(InputError, match="unknown field") as error:
        upgraded(plain, SECTIONS, DEFAULT, others)
    assert (error.value.field, error.value.found) == (field, 1)


def test_a_configuration_is_the_default_with_the_values_that_are_still_there() -> None:
    before = copy.deepcopy(DEFAULT)
    old = {
        "agent": {"lr": 0.5, "tau": 1.0},
        "rad": {"kind": "b"},
        "bc": {"lr": 9.0},
        "policy": {"width": 7},
        "acting": {"replan": 2, "views": 1},
        "data": {"prompts": "here"},
    }
    found = upgraded(old, SECTIONS, DEFAULT, others)
    assert found["method"] == {
        "name": "m",
        "lr": 0.5,
        "states": {"kind": "b"},
        "network": {"width": 7, "demonstration": {"steps": 5}},
        "acting": {"action_horizon": 2},
    }
    assert found["data"] == {"demonstrations": "here", "path": None}
    assert before == DEFAULT, "the default is left alone"
    with pytest.raises(InputError, match="no longer possible") as error:
        upgraded({"acting": {"views": 2}}, SECTIONS, DEFAULT, others)
    assert (error.value.field, error.value.found, error.value.expected) == ("acting.views", 2, 1)
