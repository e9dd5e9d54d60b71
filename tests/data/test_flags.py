"""Where episodes end, by the flags that files have: neither of two is ignored, and none is guessed."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from llmdpd.data.flags import as_flags, episode_ends, find_success, first_success, terminates
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading

ROWS = 6


def at(*rows: int, inverted: bool = False) -> np.ndarray:
    return np.isin(np.arange(ROWS), rows) != inverted


@pytest.mark.parametrize(
    ("fields", "itself", "last", "terminals"),
    [
        ({"terminals": at(1), "timeouts": at(3)}, None, [1, 3, 5], [1]),
        ({"terminations": at(1), "truncations": at(3)}, False, [1, 3, 5], [1]),
        ({"terminals": at(1), "timeouts": at(1)}, True, [1, 5], [1]),
        ({"terminals": at(2, 5), "masks": at(2, inverted=True)}, None, [2, 5], [2]),
        ({"terminals": at(2, 5), "masks": at(inverted=True)}, True, [2, 5], []),
        ({"terminals": at(2, 5)}, False, [2, 5], []),
        ({"terminals": at(5)}, True, [5], [5]),
        ({"dones": at(5)}, True, [5], [5]),
        ({"dones": at(1, 5)}, False, [1, 5], []),
        ({"terminals": at()}, None, [5], []),
        ({"terminals": at(), "dones": at(1, 3)}, None, [1, 3, 5], []),
        ({"terminals": at(1), "dones": at(1, 3)}, True, [1, 3, 5], [1]),
        ({"terminals": at(5), "dones": at(5)}, True, [5], [5]),
        ({"terminals": at(1), "timeouts": at(3), "dones": at(1, 3, 5)}, None, [1, 3, 5], [1]),
        ({"terminals": at(1), "timeouts": at(3), "dones": at(1)}, None, [1, 3, 5], [1]),
        ({"dones": at(1, 3), "truncations": at(1, 3)}, True, [1, 3, 5], []),
        ({"dones": at(1, 3), "truncations": at(3)}, None, [1, 3, 5], [1]),
        ({"dones": at(1), "truncations": at(3)}, None, [1, 3, 5], [1]),
        ({"terminals": at(1, 5), "timeouts": at(1, 5), "masks": at(inverted=True)}, None, [1, 5], []),
        ({"terminals": at(1, 5), "timeouts": at(5), "masks": at(1, inverted=True)}, None, [1, 5], [1]),
        ({"terminals": at(1), "timeouts": at(3), "masks": at(1, inverted=True)}, None, [1, 3, 5], [1]),
        ({"terminals": at().astype(np.float32)[:, None], "timeouts": at(3).astype(int)}, None, [3, 5], []),
    ],
)
def test_what_flags_mean(fields: dict[str, Any], itself: bool | None, last: list[int], terminals: list[int]) -> None:
    ends = episode_ends(fields, ROWS, itself, "file")
    assert np.flatnonzero(ends.last).tolist() == last
    assert np.flatnonzero(ends.terminals).tolist() == terminals


@pytest.mark.parametrize(
    ("fields", "itself", "field", "words"),
    [
        ({"timeouts": at(1)}, True, "terminals", "missing"),
        ({"terminals": at(5)}, None, "timeouts", "true ends or time limits"),
        ({"terminals": at(1)}, True, "timeouts", "time limits are not marked"),
        ({"dones": at(1)}, None, "timeouts", "beside `dones`"),
        ({"terminals": at(1) * 2}, False, "terminals", "wrong flags"),
        ({"terminals": at(1), "timeouts": at(1) * np.nan}, False, "timeouts", "wrong flags"),
        ({"terminals": at(1), "masks": at(1) * 0.5}, False, "masks", "wrong flags"),
        ({"terminals": at(1)[:-1]}, False, "terminals", "unequal lengths"),
        ({"terminals": at(1), "timeouts": at(1)[:-1]}, False, "timeouts", "unequal lengths"),
        ({"terminals": at(1, 3), "dones": at(3)}, True, "dones", "disagree"),
        ({"terminals": at(1), "timeouts": at(3), "dones": at(1, 2, 3)}, None, "dones", "disagree"),
        ({"terminals": at(1), "timeouts": at(3), "dones": at(3)}, None, "dones", "disagree"),
        ({"dones": at(1, 3), "truncations": at(2, 3)}, None, "truncations", "disagree"),
        ({"terminals": at(1), "timeouts": at(3), "masks": at(inverted=True)}, None, "masks", "disagree"),
        ({"terminals": at(1), "timeouts": at(3), "masks": at(1, 2, inverted=True)}, None, "masks", "disagree"),
        ({"terminals": np.array(["no"] * ROWS)}, False, "terminals", "wrong flags"),
    ],
)
def test_what_is_not_known_is_refused(fields: dict[str, Any], itself: bool | None, field: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        episode_ends(fields, ROWS, itself, "file", " of record 3")
    assert (caught.value.path, caught.value.field) == ("file", f"{field} of record 3")
    if words == "disagree":
        assert sum(name in str(caught.value.found) for name in fields) == 2, "both of them are named"


def test_masks_inside_trajectories_end_episodes_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"terminals": at(5), "masks": at(1, 2, inverted=True)}
    with caplog.at_level(logging.WARNING):
        ends = episode_ends(fields, ROWS, False, "scene.npz")
    assert np.flatnonzero(ends.last).tolist() == [1, 2, 5]
    assert np.flatnonzero(ends.terminals).tolist() == [1, 2]
    assert "scene.npz: 2 steps" in caplog.text


def test_a_suite_says_whether_episodes_end_by_themselves() -> None:
    known = {"push-v2": False, "metaworld/push/expert-v0": False, "hopper-medium-v2": True, "my-robot": None}
    widths = {name: (11, 3) if "hopper" in name else (39, 4) for name in known}
    assert {name: terminates(name, DEFAULT_READING, widths[name]) for name in known} == known
    assert {terminates(name, Reading(terminates=True), (2, 1)) for name in known} == {True}
    for name in known:  # a file of another robot's, or one that a task file names: its name says nothing
        assert terminates(name, DEFAULT_READING, (39, 3)) is None
        assert terminates(name, Reading(by_name=False), widths[name]) is None


def test_success_is_found_by_its_customary_names_or_the_one_that_is_told() -> None:
    infos = {"is_success": 1, "task": {"done": 2}}
    assert find_success({"infos": infos, "rewards": 0}, DEFAULT_READING) == ("infos/is_success", 1)
    assert find_success({"infos": infos, "success": 3}, DEFAULT_READING) == ("success", 3)
    assert find_success({"infos/success": 4}, DEFAULT_READING) == ("infos/success", 4)
    assert find_success({"infos": infos}, Reading(success="task/done")) == ("infos/task/done", 2)
    assert find_success({"rewards": 0}, DEFAULT_READING) is None
    flags = {"success": at(3), "infos": {"is_success": at(3), "done": at(1)}}
    assert find_success(flags, DEFAULT_READING) == ("success", flags["success"])
    flags["infos"]["is_success"] = at(3, 4)
    with pytest.raises(InputError, match="disagree") as caught:
        find_success(flags, DEFAULT_READING, "file", " of record 1")
    assert (caught.value.path, caught.value.field) == ("file", "success of record 1")
    assert "success and infos/is_success" in str(caught.value.found)
    assert find_success(flags, Reading(success="success")) == ("success", flags["success"])
    assert first_success(at(2, 4)) == (1, 2)
    assert first_success(at()) == (0, -1)
    np.testing.assert_array_equal(as_flags([[1], [0]], "x", None), [True, False])
