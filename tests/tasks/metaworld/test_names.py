from __future__ import annotations

import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN, TASKS, check_task, is_metaworld


def test_static_names_are_metaworlds_own() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ML45_V3
    from metaworld.policies import ENV_POLICY_MAP

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(TASKS) == 50
    assert set(ML45_TEST) == set(ML45_V3["test"])
    assert set(ML45_TRAIN) == set(ML45_V3["train"])
    assert len(ML45_TRAIN) == 45


SPELLINGS = (
    *("sweep-into", "sweep-into-v1", "sweep-into-v2", "sweep-into-v3", " sweep-into ", "Sweep-Into", "sweep_into_v2"),
    *("metaworld/sweep-into/expert-v0", "metaworld/sweep-into-v3/scripted-v0", "Meta-World/sweep_into-v2"),
    *("metaworld-sweep-into", "sweep-into-v2-goal-observable", "sweep-into-v2-goal-hidden"),
)


@pytest.mark.parametrize("name", SPELLINGS)
def test_check_task_accepts_every_spelling(name: str) -> None:
    assert check_task(name) == "sweep-into-v3"
    assert is_metaworld(name)


@pytest.mark.parametrize("name", ["box-clse", "", "hopper", "sweep-into-v4", "sweep/into", "mine/sweep-into/v0"])
def test_other_names_are_refused(name: str) -> None:
    assert not is_metaworld(name)
    with pytest.raises(InputError, match=f"unknown Meta-World task '{name}'") as caught:
        check_task(name)
    offered = str(caught.value.hint).removeprefix("nearest: ").split(", ")
    assert set(offered) <= set(TASKS)
    assert name != "box-clse" or offered[0] == "box-close-v3"
