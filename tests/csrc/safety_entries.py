"""Every function of native code that takes arrays: how it is called, arguments that fit, and which it writes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from llmdpd.ops import native, operators

B, S, A, Z, H, T, K, N = 6, 3, 2, 5, 8, 4, 7, 9
F32 = np.float32


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


def trunk(outputs: int) -> list[np.ndarray]:
    return [ones(H, H), ones(H), ones(H, H), ones(H), ones(outputs, H), ones(outputs)]


def packed_net(**changed: Any) -> Any:
    arguments = {"action_dim": A, "time_dim": T, "first_weight": ones(H, A + T + S + Z), "first_bias": ones(H)}
    return native.module().PackedNet(**(arguments | {"trunk": trunk(A), "state_dim": S, "bf16": False} | changed))


def promptless_net() -> Any:
    weights = {"first_weight": ones(H, A + T + S), "first_bias": ones(H), "trunk": trunk(A)}
    return native.module().PackedNet(A, T, **weights, state_dim=S, bf16=False)


def sampler(**changed: Any) -> Any:
    arguments = {"net": packed_net(), "table": ones(K, 6), "time_embedding": ones(K, T), "start": 1.0, "clip": 1.0}
    return native.module().Sampler(**(arguments | changed))


def run(**arguments: Any) -> None:
    sampler().run(**arguments)


RUN = {
    "state": ones(B, S),
    "prompt": ones(B, Z),
    "samples": N,
    "keys": np.ones(B, np.uint64),
    "noise": ones(K + 1, B * N, A),
    "actions": ones(B * N, A),
    "threads": 2,
}


def critic(**changed: Any) -> Any:
    arguments = {"state_dim": S, "action_dim": A, "first_weight": ones(H, S + A + Z), "first_bias": ones(H)}
    return native.module().PackedCritic(**(arguments | {"trunk": trunk(1), "bf16": False} | changed))


def act(**arguments: Any) -> None:
    native.module().Actor(sampler(), critic(), critic(), N, True, 1.0).act(**arguments)


ACT = {"state": ones(B, S), "prompt": ones(B, Z), "keys": np.ones(B, np.uint64), "actions": ones(B, A), "threads": 2}
CHAIN = {
    "state": ones(B, S),
    "W_s": ones(H, S),
    "u_z": ones(B, H),
    "tau": ones(K, H),
    "W_a": ones(H, A),
    "trunk": trunk(A),
    "table": ones(K, 6),
    "keys": np.ones(B, np.uint64),
    "noise": ones(K + 1, B * N, A),
    "start": 1.0,
    "clip": 1.0,
    "samples": N,
    "bf16": False,
    "threads": 2,
}
MLP = {"x": ones(B, S), "input_weight": ones(H, S), "init": ones(B, H), "trunk": trunk(A), "bf16": False, "threads": 2}


G, M, STEPS, W, WIDE, HEADS, GEOMETRY = 2, 5, 6, 12, 10, 3, 4
COMPARED, FOUND = GEOMETRY + 1, A + 2 * GEOMETRY


def context(**changed: Any) -> Any:
    """Every part switched on; weights may be given by `weights_NAME`."""
    layer = {"query_norm": (W,), "forward_norm": (W,), "query": (W, W), "out": (W, W), "widen": (2 * W, W)}
    sizes = {f"layers.0.{name}": size for name, size in (layer | {"narrow": (W, 2 * W)}).items()}
    sizes |= {"query": (W, S + 2 + Z), "norm": (W,), "waypoint_query": (W, W)}
    weights = {f"{name}.weight": ones(*size) for name, size in sizes.items()}
    weights |= {f"{name}.bias": ones(size[0]) for name, size in sizes.items()} | {"likeness": ones(HEADS, COMPARED)}
    kinds = np.array([(2, column, 0, 0, -1) for column in range(S)], np.int32)
    table, few = (kinds, ones(S, 2)), np.array([(3, 0, 1, -1, 0)] * GEOMETRY, np.int32)
    arguments = {"state_dim": S, "action_dim": A, "lookaheads": 2, "heads": HEADS, "points": [[0, 1]], "own": table}
    arguments |= {"geometry": (few, ones(GEOMETRY, 2)), "periods": [8.0], "time_unit": 50.0, "weights": weights}
    return native.module().Context(**(arguments | changed))


def prompts(**changed: Any) -> Any:
    """Two prompts; what is remembered of them by its own name."""
    heads = (G, HEADS, STEPS, W // HEADS)
    shapes = {"bias": (G, STEPS), "waypoint_bias": (G, STEPS), "query_init": (G, W), "key0": heads, "value0": heads}
    shapes |= {"waypoint_key": heads, "waypoints": (G, STEPS, FOUND), "there": (G, STEPS, COMPARED)}
    memory = {name: ones(*shape) for name, shape in shapes.items()}
    pooled = changed.pop("pooled", ones(G, Z))
    return native.module().Prompts(context(), pooled, memory | changed)


def act_in_context(**arguments: Any) -> None:
    width = S + 2 + W + HEADS * (A + 4 * GEOMETRY)
    net = packed_net(first_weight=ones(H, A + T + width + Z), state_dim=width)
    prompts().act(sampler(net=net), None, **arguments)


ACT_IN_CONTEXT = {"observations": ones(B, S), "times": np.ones(B, np.int64), "prompt_of": np.ones(B, np.int64)}
ACT_IN_CONTEXT |= {"keys": np.ones(B, np.uint64), "actions": ones(B, A), "threads": 2}
LINEAR = {"x": ones(B, S), "norm": [ones(S), ones(S)], "weights": [ones(H, S), ones(A, S)]}
LINEAR |= {"biases": [ones(H), ones(A)], "threads": 2}
NORM = {"x": ones(B, S), "norm": [ones(S), ones(S)], "threads": 2}
ATTENTION = {"hidden": ones(G, M, W), "key": ones(G, STEPS, W), "value": ones(G, STEPS, W), "bias": ones(G, STEPS)}
ATTENTION_WEIGHTS = [ones(W)] * 4 + [ones(W, W), ones(W), ones(W, W), ones(W), ones(WIDE, W), ones(WIDE)]
ATTENTION_WEIGHTS += [ones(W, WIDE), ones(W)]
ATTENTION |= {"heads": HEADS, "weights": ATTENTION_WEIGHTS, "threads": 2}
RETRIEVAL = {"query": ones(G, M, W), "key": ones(G, STEPS, W), "bias": ones(G, STEPS), "here": ones(G, M, COMPARED)}
RETRIEVAL |= {"there": ones(G, STEPS, COMPARED), "similarity": ones(HEADS, COMPARED), "heads": HEADS, "threads": 2}
RETRIEVAL |= {"waypoints": ones(G, STEPS, FOUND), "action_dim": A, "geometry": GEOMETRY}
RETRIEVED = ones(G, M, HEADS * (A + 4 * GEOMETRY))
TENSORS = [ones(H, S), ones(H)]


def node_of(name: str) -> Callable[..., None]:
    """A node of training, forward and backward."""

    def call(tape: np.ndarray, results: Any, grads: Any, gradients: np.ndarray, **given: Any) -> None:
        node = getattr(native.module(), name)(**given)
        node.forward(tape, results)
        node.backward(tape, grads, gradients)

    return call


def node_entry(name: str, given: dict[str, Any], results: list[np.ndarray], weights: str) -> tuple[Any, Any, Any]:
    """The node, what it is given and room for what it writes."""
    tape = ones(getattr(native.module(), name)(**given).tape_floats())
    written = {"results": results, "grads": [part.copy() for part in results], "tape": tape}
    written["gradients"] = ones(sum(part.size for part in given[weights]))
    return node_of(name), given | written, {"tape", "results", "gradients"}


def pair(outputs: int, inputs: int) -> list[np.ndarray]:
    return [ones(outputs, inputs), ones(outputs)]


NORMED = [ones(W), ones(W)]
SHAPE = (True, 1, HEADS, 1, HEADS, True, True, A, GEOMETRY)
PROMPT_WEIGHTS = [*pair(H, Z), *pair(H, H), *pair(3, H), *pair(W, S), ones(W, 2), *NORMED, *pair(3 * W, W), *pair(W, W)]
PROMPT_WEIGHTS += [*NORMED, *pair(WIDE, W), *pair(W, WIDE), *NORMED, *pair(H, W), *pair(5, H), *pair(W, W + 4), ones(W)]
PROMPT_WEIGHTS += [*NORMED, *pair(W, W), *pair(W, W), *pair(W, W)]
PROMPTS = {"shape": SHAPE, "text": ones(G, Z), "keep_text": ones(G, 1), "keep_trajectory": ones(G, 1), "threads": 2}
PROMPTS |= {"steps": ones(G * STEPS, S + 2), "embedded": ones(G * STEPS, 4), "mask": ones(G, STEPS)}
PROMPTS |= {"bias": ones(G, STEPS), "weights": PROMPT_WEIGHTS}
READ = [ones(G, 8), *(ones(G, STEPS + 1, W) for _ in range(3))]
GIVEN = [ones(G, 8), *(ones(G * STEPS, W) for _ in range(3)), *pair(W, S + 3), *NORMED, *NORMED, *pair(W, W)]
GIVEN += [*pair(W, W), *pair(WIDE, W), *pair(W, WIDE), *NORMED, *pair(W, W), ones(HEADS, COMPARED)]
STATES = {"shape": SHAPE, "own": ones(G * M, S), "here": ones(G * M, COMPARED), "bias": ones(G, STEPS), "threads": 2}
STATES |= {"waypoint_bias": ones(G, STEPS), "there": ones(G, STEPS, COMPARED), "waypoints": ones(G, STEPS, FOUND)}
NOISY = {"actions": ones(G * M, A), "waves": ones(3, T), "place": np.ones(G * M, np.int64), "bf16": False, "threads": 2}
NOISY |= {"keep": 1 << 20, "given": [ones(G * M, S), ones(G, Z), *pair(9, T), *pair(T, 9), *pair(H, A + T + S + Z)]}
NOISY["given"] += [*pair(H, H), *pair(H, H), *pair(A, H)]
NOISY["prompted"] = True
SAMPLED = {"waves": ones(K, T), "given": [ones(B, S), ones(B, Z), *NOISY["given"][2:]], "action_dim": A}
SAMPLED |= {name: CHAIN[name] for name in ("table", "keys", "noise", "start", "clip", "samples", "bf16", "threads")}
SAMPLED |= {"prompted": True, "need_state": True, "keep": 1 << 20}


def layer_tape(name: str, *sizes: int) -> np.ndarray:
    return ones(getattr(native.module(), name)(*sizes))


def of_module(name: str) -> Callable[..., None]:
    """The function of the module."""
    return lambda **given: getattr(native.module(), name)(**given)


def of_arguments(arguments: str, name: str) -> Callable[..., None]:
    """The function `name`, whose first argument is made of those that begin with `in_`."""

    def call(**given: Any) -> None:
        own = {key.removeprefix("in_"): value for key, value in given.items() if key.startswith("in_")}
        rest = {key: value for key, value in given.items() if not key.startswith("in_")}
        getattr(native.module(), name)(getattr(native.module(), arguments)(**own), **rest)

    return call


def net(**given: Any) -> Any:
    return native.module().MlpArguments(**given)


def prepared(prepare: Callable[[Any, Any], object], threads: int = 2) -> None:
    """What is prepared, run twice by two threads; it keeps what it reads."""
    calls = native.module().PreparedCalls()
    prepare(native.module(), calls)
    gc.collect()
    native.module().run_together([calls, calls], threads)


def later(name: str) -> Callable[..., None]:
    """The function `add_NAME`, which prepares a call, and the call."""
    return lambda threads=2, **given: prepared(
        lambda module, calls: getattr(module, f"add_{name}")(calls, **given), threads
    )


def node_later(name: str, kind: str | None = None) -> Callable[..., None]:
    """A node of training, forward and backward, prepared; `kind`: of the node, where it is not the calls' name."""

    def call(tape: np.ndarray, results: Any, grads: Any, gradients: np.ndarray, **given: Any) -> None:
        def prepare(module: Any, calls: Any) -> None:
            node = getattr(module, f"{kind or name}_node")(**given)
            getattr(module, f"add_{name}_forward")(calls, node, tape, results)
            getattr(module, f"add_{name}_backward")(calls, node, tape, grads, gradients)

        prepared(prepare)

    return call


def inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    return {f"in_{name}": value for name, value in arguments.items()}


def tape(rows: int, action_dim: int, samples: int, steps: int) -> np.ndarray:
    return ones(operators.tape_floats(rows, H, A, action_dim, samples, steps, False))


# A new entry point is a line here: the call, good arguments, and those of them that are written.
ENTRIES: dict[str, tuple[Callable[..., Any], dict[str, Any], set[str]]] = {
    "PackedNet": (
        packed_net,
        {"first_weight": ones(H, A + T + S + Z), "first_bias": ones(H), "trunk": trunk(A)},
        set(),
    ),
    "Sampler": (sampler, {"table": ones(K, 6), "time_embedding": ones(K, T)}, set()),
    "run": (run, RUN, {"actions"}),
    "PackedCritic": (critic, {"first_weight": ones(H, S + A + Z), "first_bias": ones(H), "trunk": trunk(1)}, set()),
    "act": (act, ACT, {"actions"}),
    "chain_forward": (
        of_arguments("ChainArguments", "chain_forward"),
        inputs(CHAIN) | {"actions": ones(B * N, A), "tape": tape(B * N, A, N, K)},
        {"actions", "tape"},
    ),
    "chain_backward": (
        of_arguments("ChainArguments", "chain_backward"),
        inputs(CHAIN)
        | {"grad_actions": ones(B * N, A), "tape": tape(B * N, A, N, K), "state": ones(B, S), "W_s": ones(H, S)}
        | {"u_z": ones(B, H), "tau": ones(K, H), "W_a": ones(H, A), "trunk": trunk(A)},
        {"state", "W_s", "u_z", "tau", "W_a", "trunk"},
    ),
    "mlps_forward": (
        lambda out, tape, **given: native.module().mlps_forward([net(**given)], [out], [tape]),
        MLP | {"out": ones(B, A), "tape": tape(B, 0, 1, 1)},
        {"out", "tape"},
    ),
    "mlps_backward": (
        lambda grad_out, tape, d_x, weights, **given: native.module().mlps_backward(
            [net(**given)], [grad_out], [tape], [d_x], [weights]
        ),
        MLP
        | {"grad_out": ones(B, A), "tape": tape(B, 0, 1, 1), "d_x": ones(B, S)}
        | {"weights": [ones(H, S), ones(B, H), *trunk(A)]},
        {"d_x", "weights"},
    ),
    "Prompts": (
        prompts,
        {"pooled": ones(G, Z), "bias": ones(G, STEPS), "key0": ones(G, HEADS, STEPS, W // HEADS)}
        | {"waypoints": ones(G, STEPS, FOUND), "there": ones(G, STEPS, COMPARED), "query_init": ones(G, W)},
        set(),
    ),
    "act_in_context": (act_in_context, ACT_IN_CONTEXT, {"actions"}),
    "features": (
        lambda **given: context().features(**given),
        {"observations": ones(B, S), "own": ones(B, S), "geometry": ones(B, GEOMETRY), "threads": 2},
        {"own", "geometry"},
    ),
    "linear_forward": (
        of_module("linear_forward"),
        LINEAR | {"out": [ones(B, H), ones(B, A)], "tape": layer_tape("linear_tape", B, S, True)},
        {"out", "tape"},
    ),
    "linear_backward": (
        of_module("linear_backward"),
        LINEAR
        | {"d_out": [ones(B, H), ones(B, A)], "tape": layer_tape("linear_tape", B, S, True), "d_x": ones(B, S)}
        | {"d_norm": [ones(S), ones(S)], "d_weights": [ones(H, S), ones(A, S)], "d_biases": [ones(H), ones(A)]},
        {"d_x", "d_norm", "d_weights", "d_biases"},
    ),
    "norm_forward": (
        lambda **given: native.module().linear_forward(weights=[], biases=[], **given),
        NORM | {"out": [ones(B, S)], "tape": layer_tape("linear_tape", B, S, True)},
        {"out", "tape"},
    ),
    "norm_backward": (
        lambda **given: native.module().linear_backward(weights=[], biases=[], d_weights=[], d_biases=[], **given),
        NORM
        | {"d_out": [ones(B, S)], "tape": layer_tape("linear_tape", B, S, True), "d_x": ones(B, S)}
        | {"d_norm": [ones(S), ones(S)]},
        {"d_x", "d_norm"},
    ),
    "attention_forward": (
        of_module("attention_forward"),
        ATTENTION | {"out": ones(G, M, W), "tape": layer_tape("attention_tape", G, M, STEPS, W, WIDE, HEADS)},
        {"out", "tape"},
    ),
    "attention_backward": (
        of_module("attention_backward"),
        ATTENTION
        | {"d_out": ones(G, M, W), "tape": layer_tape("attention_tape", G, M, STEPS, W, WIDE, HEADS)}
        | {"gradients": [ones(G, M, W), ones(G, STEPS, W), ones(G, STEPS, W), *map(np.copy, ATTENTION_WEIGHTS)]},
        {"gradients"},
    ),
    "retrieval_forward": (
        of_module("retrieval_forward"),
        RETRIEVAL | {"out": RETRIEVED.copy(), "tape": layer_tape("retrieval_tape", G * M, STEPS, HEADS)},
        {"out", "tape"},
    ),
    "retrieval_backward": (
        of_module("retrieval_backward"),
        RETRIEVAL
        | {
            "out": RETRIEVED.copy(),
            "d_out": RETRIEVED,
            "tape": layer_tape("retrieval_tape", G * M, STEPS, HEADS),
            "d_query": ones(G, M, W),
        }
        | {"d_key": ones(G, STEPS, W), "d_similarity": ones(HEADS, COMPARED)},
        {"d_query", "d_key", "d_similarity"},
    ),
    "prompt_node": node_entry("prompt_node", PROMPTS, READ, "weights"),
    "state_node": node_entry(
        "state_node", STATES | {"given": GIVEN}, [ones(G * M, S + W + HEADS * (A + 4 * GEOMETRY))], "given"
    ),
    "prediction_node": node_entry("prediction_node", NOISY, [ones(G * M, A)], "given"),
    "chain_node": node_entry("chain_node", SAMPLED, [ones(B, N, A)], "given"),
    "adamw": (
        of_module("adamw"),
        {"weights": TENSORS, "gradients": TENSORS, "means": TENSORS, "squares": TENSORS, "rate": 0.1, "beta1": 0.9}
        | {"beta2": 0.9, "epsilon": 0.1, "decay": 0.1, "step": 1, "scale": 1.0, "threads": 2},
        {"weights", "means", "squares"},
    ),
    "average": (
        of_module("average"),
        {"targets": TENSORS, "sources": TENSORS, "rate": 0.5, "threads": 2},
        {"targets"},
    ),
    "add_up": (
        of_module("add_up"),
        {"tensors": TENSORS, "rows": [ones(sum(t.size for t in TENSORS))], "threads": 2},
        {"tensors"},
    ),
    "add_step": (
        later("step"),
        {name: [ones(H, S), ones(H)] for name in ("weights", "gradients", "means", "squares")}
        | {"settings": np.full(7, 0.5), "norm": ones(1), "averages": [ones(H, S), ones(H)]}
        | {"average_rate": np.ones(1), "threads": 1},
        {"weights", "means", "squares", "norm", "averages"},
    ),
    "add_average": (
        later("average"),
        {"targets": [ones(H, S), ones(H)], "sources": TENSORS, "rate": np.ones(1), "threads": 1},
        {"targets"},
    ),
    "add_copy": (later("copy"), {"to": ones(B, A), "source": ones(B, A), "sum": True}, {"to"}),
    "add_sample": (
        lambda **given: later("sample")(sampler=sampler(net=promptless_net()), **given),
        {"state": ones(B, S), "key": np.ones(1, np.uint64), "actions": ones(B, A)},
        {"actions"},
    ),
}
ENTRIES |= {
    "add_prediction": (node_later("prediction"), *ENTRIES["prediction_node"][1:]),
    "add_prompts": (node_later("prompts", "prompt"), *ENTRIES["prompt_node"][1:]),
    "add_states": (node_later("states", "state"), *ENTRIES["state_node"][1:]),
    "add_chain": (node_later("chain"), *ENTRIES["chain_node"][1:]),
    "add_mlps_forward": (
        lambda out, tape, **given: later("mlps_forward")(nets=[net(**given)], outs=[out], tapes=[tape]),
        *ENTRIES["mlps_forward"][1:],
    ),
    "add_mlps_backward": (
        lambda grad_out, tape, d_x, weights, **given: later("mlps_backward")(
            nets=[net(**given)], grads=[grad_out], tapes=[tape], x=[d_x], weights=[weights]
        ),
        *ENTRIES["mlps_backward"][1:],
    ),
}
