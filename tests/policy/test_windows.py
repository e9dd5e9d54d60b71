"""What windows of steps each method learns from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmdpd.config.parse import parse_train
from llmdpd.methods import METHODS
from llmdpd.nn.policy_network import Window
from llmdpd.nn.spaces import Spaces
from llmdpd.tasks.metaworld.layout import LAYOUT

HORIZON, SEQUENCE = "--method.network.trajectory.horizon", "--method.network.sequence.context"
CHUNK = "--method.network.chunk"
EXPECTED = {
    "trajectory-diffusion": ([HORIZON, "6"], Window(6)),
    "dt": ([SEQUENCE, "5"], Window(5)),
    "prompt-dt": ([SEQUENCE, "5"], Window(5)),
    "lamo": ([SEQUENCE, "5"], Window(5)),
    "mtdiff": ([HORIZON, "6", "--method.network.trajectory.history", "3"], Window(6, 2)),
    "otto": (["--method.network.world.horizon", "6"], Window(6)),
    "diffusion-bc": ([CHUNK, "3"], Window(3)),
    "llmdpd": ([CHUNK, "3"], Window(3)),
}
"""Methods that learn from more than transitions, with some options, and their windows then."""


@pytest.mark.parametrize("method", METHODS)
def test_each_method_says_what_it_learns_from(method: str) -> None:
    options, expected = EXPECTED.get(method, ([], Window()))
    network: Any = parse_train(["--method", method, *options]).method.network
    if method == "lamo":
        tiny = dataclasses.replace(network.language, layers=1, heads=1, width=4, inner=4)
        network = dataclasses.replace(network, language=tiny)
    assert METHODS[method].build_network(Spaces(39, 4, 8, LAYOUT), network).window == expected
    if CHUNK in options:
        single = dataclasses.replace(network, chunk=1)
        assert METHODS[method].build_network(Spaces(39, 4, 8, LAYOUT), single).window == Window()
