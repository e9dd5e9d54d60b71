from __future__ import annotations

import pytest

from llmdpd.tasks.names import base_name


@pytest.mark.parametrize(
    ("name", "base"),
    [("push-v3", "push"), ("hopper-v5", "hopper"), ("push", "push"), ("x-v2-v10", "x-v2"), ("a-v", "a-v")],
)
def test_a_name_without_its_version(name: str, base: str) -> None:
    assert base_name(name) == base
