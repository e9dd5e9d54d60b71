"""What windows of steps each method learns from."""

from __future__ import annotations

import dataclasses

import pytest

from llmdpd.cli.train import configuration
from llmdpd.methods.networks import METHODS, make_network
from llmdpd.nn.policy_network import Window

EXPECTED = {
    "trajectory-diffusion": Window(6),
    "dt": Window(5),
    "prompt-dt": Window(5),
    "lamo": Window(5),
    "mtdiff": Window(6, 2),
}
"""Methods that learn from more than transitions, made with a plan of 6 steps after 3 states, and a context of 5."""


@pytest.mark.parametrize("method", METHODS)
def test_each_method_says_what_it_learns_from(method: str) -> None:
    words = ["--preset", "metaworld-trajectory-diffusion"] if method == "trajectory-diffusion" else ["--agent", method]
    policy = configuration(words).policy
    plan = dataclasses.replace(policy.plan, horizon=6, history=3)
    sequence = dataclasses.replace(policy.sequence, context=5)
    sizes = {"layers": 1, "heads": 1, "width": 4, "inner": 4}
    language = dataclasses.replace(policy.language, **sizes)
    config = dataclasses.replace(policy, plan=plan, sequence=sequence, language=language, chunk=1)
    assert make_network(method, 39, 4, 8, config).window == EXPECTED.get(method, Window())
    if method in ("llmdpd", "diffusion-bc", "diffusion-ql"):
        assert make_network(method, 39, 4, 8, dataclasses.replace(config, chunk=3)).window == Window(3)
