"""Private calls of the compiled module with what they cannot take: an exception, never a crash of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PREPARED = """
import numpy as np
from llmdpd import _native as n
f = lambda *shape: np.zeros(shape, np.float32)
trunk = [f(8, 8), f(8), f(8, 8), f(8), f(2, 8), f(2)]
net = n.PackedNet(2, 4, f(8, 10), f(8), trunk, 3, False)
sampler = n.Sampler(net, f(3, 6), f(3, 4), 1.0, 1.0)
critic = n.PackedCritic(3, 2, f(8, 6), f(8), trunk[:4] + [f(1, 8), f(1)], False)
key, time = np.zeros(1, np.uint64), np.zeros(1, np.int64)
i = lambda *shape: np.zeros(shape, np.int32)
rows = np.array([(0, column, 0, -1, -1) for column in range(3)], np.int32)
plain = n.Context(3, 2, 0, 0, [], (rows, f(3, 2)), (i(0, 5), f(0, 2)), [], 1.0, {})
new = lambda kind: kind.__new__(kind)  # allocated, not initialised
freed = lambda array: array.resize((0,), refcheck=False)
"""
REFUSED = [
    "n.Sampler(None, f(3, 6), f(3, 4), 1.0, 1.0)",
    "n.Sampler(new(n.PackedNet), f(3, 6), f(3, 4), 1.0, 1.0)",
    "n.Sampler.run(None, f(1, 3), f(1), 1, key, None, f(1, 2), 1)",
    "new(n.Sampler).run(f(1, 3), f(1), 1, key, None, f(1, 2), 1)",
    "sampler.run(None, f(1), 1, key, None, f(1, 2), 1)",
    "n.Actor(None, critic, critic, 3, True, 1.0)",
    "n.Actor(sampler, None, critic, 3, True, 1.0)",
    "n.Actor(sampler, critic, None, 3, True, 1.0)",
    "n.Actor.act(None, f(1, 3), f(1), key, f(1, 2), 1)",
    "new(n.Actor).act(f(1, 3), f(1), key, f(1, 2), 1)",
    "n.Snapshot(None)",
    "n.Snapshot([None])",
    "n.Snapshot([np.array([object()])])",
    "n.Snapshot([f(4, 4).T])",
    "n.Snapshot.unchanged(None)",
    "new(n.Snapshot).unchanged()",
    "n.all_in_place(None)",
    "n.all_in_place((1, 2))",
    "n.all_in_place(((1, 2, 3),))",
    "n.all_in_place((({'a': None}, 'a', None, 1),))",
    "n.all_in_place((({'a': None}, 'a', None, 1, 1),))",
    "n.PackedNet(2, 4, None, f(8), trunk, 3, False)",
    "n.PackedNet(2, 4, f(8, 10), f(8), [None] * 6, 3, False)",
    "n.MlpArguments(None, None, None, None, False, 1)",
    "n.ChainArguments(*[None] * 14)",
    "n.chain_forward(None, f(1), f(0))",
    "n.chain_forward(new(n.ChainArguments), f(1), f(0))",
    "n.mlps_forward([None], [f(1)], [f(0)])",
    "n.mlps_forward([new(n.MlpArguments)], [f(1)], [f(0)])",
    "n.mlps_forward([], [], [])",
    "n.mlps_backward([None], [f(1)], [f(0)], [], [[]])",
    "x = f(4, 3); m = n.MlpArguments(x, f(8, 3), f(8), trunk, False, 1); freed(x); n.mlps_forward([m], [f(4, 2)], [])",
    "m = n.MlpArguments(f(4, 3), f(8, 3), f(8), trunk, False, 1); "
    "n.mlps_forward([m, m], [f(4, 2)] * 2, [f(0), f(9999)])",
    "m, o = (n.MlpArguments(f(r, 3), f(8, 3), f(8), trunk, False, 1) for r in (4, 5)); "
    "n.mlps_forward([m, o], [f(4, 2), f(5, 2)], [f(0)] * 2)",
    "x = f(4, 3); t = n.Snapshot([x]); freed(x); assert t.unchanged()",
    "n.pooled_buffer(1 << 62)",
    "n.Context(3, 2, 1, 1, [[7]], (i(0, 5), f(0, 2)), (i(0, 5), f(0, 2)), [], 1.0, {})",
    "n.Context(3, 2, 1, 1, [], (i(1, 5) + 9, f(1, 2)), (i(0, 5), f(0, 2)), [], 1.0, {})",
    "n.Context(3, 2, 1, 0, [], (i(0, 5), f(0, 2)), (i(0, 5), f(0, 2)), [], 1.0, {'query.weight': f(4, 4)})",
    "n.Prompts(None, f(1, 2), {})",
    "n.Prompts(new(n.Context), f(1, 2), {})",
    "new(n.Prompts).act(sampler, None, f(1, 3), time, None, key, f(1, 2), 1)",
    "n.Prompts(plain, f(1, 1), {}).act(None, None, f(1, 3), time, None, key, f(1, 2), 1)",
    "n.Prompts(plain, f(1, 1), {}).act(new(n.Sampler), None, f(1, 3), time, None, key, f(1, 2), 1)",
    "n.Prompts(plain, f(1, 1), {}).act(sampler, new(n.Actor), f(1, 3), time, None, key, f(1, 2), 1)",
    "n.Prompts(plain, f(1, 1), {}).act(sampler, None, f(1, 3), time, time + 1, key, f(1, 2), 1)",
    "n.Prompts(plain, f(1, 1), {}).act(sampler, None, f(1, 3), time, time - 1, key, f(1, 2), 1)",
    "n.linear_forward(None, [], [], [], [], f(0), 1)",
    "n.prompt_node((False, 0, 1, 1, 1, False, False, 1, 1), None, None, None, f(2, 3), None, f(1, 2), f(1, 2), [], 1)",
    "n.prompt_node((True, 0, 1, 1, 1, False, False, 1, 1), *[None] * 3, f(2, 3), None, f(1, 2), f(1, 2), [], 1)",
    "n.state_node((False, 0, 1, 1, 1, True, True, 1, 1), f(4, 3), f(4, 2), f(2, 2), None, None, None, [], 1)",
    "n.prediction_node(f(4, 2), f(2, 2), i(4), [], True, False, 0, 1)",
    "n.chain_node(f(2, 2), f(2, 6), key, None, 1.0, 1.0, 1, 2, [], True, False, False, 0, 1)",
    "n.chain_node(f(2, 2), f(2, 6), key, None, 1.0, 1.0, 1, 2, [f(4, 3)], True, False, False, 0, 1)",
    "n.chain_node(f(2, 2), f(2, 6), key, f(2, 4, 2), 1.0, 1.0, 1, 2, [f(4, 3)], False, False, False, 0, 1)",
    "new(n.ChainNode).tape_floats()",
    "new(n.PromptNode).forward(f(1), [])",
    "new(n.StateNode).backward(f(1), [f(1)], f(1))",
    "new(n.PredictionNode).tape_floats()",
    "n.attention_forward(f(1, 2, 4), f(1, 2, 4), f(1, 2, 4), f(1, 2), 3, [f(4)] * 12, f(1, 2, 4), f(9999), 1)",
    "n.adamw([f(3)], [f(3)], [f(3)], [f(2)], 0.1, 0.9, 0.9, 0.1, 0.0, 1.0, 1.0, 1)",
    "n.average([f(3)], [None], 0.5, 1)",
    "n.add_up([f(3), f(2)], [f(4)], 1)",
    "n.add_up([f(3)], [None], 1)",
    "n.set_isa(None)",
]


@pytest.mark.parametrize("call", REFUSED)
def test_a_wrong_private_call_raises(call: str) -> None:
    done = subprocess.run([sys.executable, "-c", PREPARED + call], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr
