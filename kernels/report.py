"""What every tile of the table takes of a multiprocessor: `python -m llmdpd.kernels.report`. Needs no device.

Each kernel is compiled ahead of time, from the launcher's own description of its launch, and its binary is asked for
registers and stack. A thread's stack is what did not fit in its registers: a spill.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.device_reading import Given, Sizes
from llmdpd.ops.reading import ContextShape

from . import learners, mish_mlp, state_reading
from . import reverse_diffusion as operation
from .launch import Launch
from .members import Members
from .weight_gradients import input_launch, new_gradients, weight_launch

TARGETS = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a program can have."""
ROWS = (256, 4096, 65536)
"""One batch size for each row of the tile table."""
STATES = 39
"""State features."""


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    shared: int
    products: int
    """Instructions of tensor cores."""
    multiply_adds: int
    """Those of a float32 multiply-add."""


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(rows: int, H: int, A: int, bf16: bool, steps: int = 5) -> ChainArguments:
    """A chain's arguments, of tensors without memory."""
    trunk = [_meta(*shape) for shape in ((H, H), (H,), (H, H), (H,), (A, H), (A,))]
    key = _meta(1, dtype=torch.int64)
    return ChainArguments(
        _meta(rows, STATES), _meta(H, STATES), _meta(H), _meta(steps, H), _meta(H, A), trunk, _meta(steps, 6), key,
        None, start=1.0, clip=1.0, samples=1, bf16=bf16,
    )  # fmt: skip


def launch(direction: str, rows: int, H: int, A: int, bf16: bool, capability: int, steps: int = 5) -> Launch:
    """The launch of a direction (`forward`, which keeps its chain, or `backward`)."""
    chain = arguments(rows, H, A, bf16, steps)
    packed, tape = operation.pack(chain), _meta(steps + 1, rows, 1, A)
    if direction == "forward":
        return operation.forward_launch(packed, chain, _meta(rows, 1, A), tape, capability=capability)
    grad, u = _meta(rows, 1, A), _meta(rows, H)
    return next(operation.backward_launches(grad, u, packed, chain, tape, capability)[0])[1]


def mlp_launches(
    rows: int, inputs: int, H: int, outputs: int, members: int, bf16: bool, capability: int
) -> list[Launch]:
    """The launches of `mish_mlp`, on tensors without memory: pack, forward, backward, weights', inputs'."""
    shapes = ((H, inputs), (H,), (H, H), (H,), (H, H), (H,), (outputs, H), (outputs,))
    x, weights = _meta(1, rows, inputs), Members.stacked([_meta(members, *shape) for shape in shapes])
    pack, packed = mish_mlp.pack(x, weights, bf16)
    out, how = _meta(members, rows, outputs), operation.precisions(bf16)
    forward = mish_mlp.forward_launch(x, weights, packed, out, bf16, capability)
    backward, hidden, slopes, d_out = mish_mlp.backward_launch(out, x, weights, packed, bf16, capability)
    into = Members.stacked(new_gradients(weights)[1])
    of_weights = weight_launch(hidden, slopes, d_out, x, into, rows, how, members)
    return [pack, forward, backward, of_weights, input_launch(slopes[0], packed.inputs, x, H, how)]


def learner_launches(rows: int, H: int, A: int, count: int, bf16: bool, capability: int) -> list[Launch]:
    """The launches of the chain of several learners, on tensors without memory: pack, forward, backward, weights'."""
    one = arguments(rows, H, A, bf16)
    flat = _meta(count, H * (A + STATES))
    W_a, W_s = flat.view(count, H, -1).split([A, STATES], dim=2)
    trunk = [flat.as_strided((count, *part.shape), (flat.shape[1], *part.stride())) for part in one.trunk]
    state, u_z, tau = (_meta(count, *part.shape) for part in (one.state, one.u_z, one.tau))
    key = _meta(count, dtype=torch.int64)
    chain = one._replace(state=state, W_s=W_s, u_z=u_z, tau=tau, W_a=W_a, trunk=trunk, key=key)
    packed, tape, actions = operation.pack(chain), _meta(count, len(one.tau) + 1, rows, 1, A), _meta(count, rows, 1, A)
    into = learners.Gradients(W_s, u_z, tau, W_a, trunk)
    back = learners.launches_back(actions, _meta(count, rows, H), chain, tape, packed, into, capability)
    forward = operation.forward_launch(packed, chain, actions, tape, capability=capability)
    return [packed.launch, forward, *back]


def reading_launches(prompts: int, rows: int, steps: int, width: int, short: bool) -> list[Launch]:
    """The launches of `state_reading`, on tensors without memory, at the default preset's sizes but for these."""
    shape = ContextShape(True, 1, 4, layers=2, heads=4, waypoints=True, similarity=True, action_dim=4, geometry=13)
    own, compared, found, text, vector = 53, 14, 30, 128, 256
    sizes = Sizes(
        prompts, rows, steps, own, text, vector, width, 2 * width, shape.layers, shape.heads, shape.action_dim,
        shape.geometry, found, compared, waypoints=True, similarity=True,
    )  # fmt: skip
    states, by_step = prompts * rows, (prompts, steps)
    given = Given(
        own=_meta(states, own), here=_meta(states, compared), bias=_meta(*by_step), waypoint_bias=_meta(*by_step),
        there=_meta(*by_step, compared), waypoints=_meta(*by_step, found), pooled=_meta(prompts, vector),
    )  # fmt: skip
    memories = 2 * shape.layers + 1
    flat, out = _meta(memories * prompts * steps * width + sizes.weights), _meta(states, sizes.condition)
    forward, kept = state_reading.forward_launch(given, sizes, flat, out, short)
    return [forward, *state_reading.backward_launches(out, out, given, sizes, flat, kept, short)[0]]


def usage(launch: Launch, capability: int) -> Usage:
    """Compile, and read what the binary takes."""
    compiled = launch.compile(capability)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True, timeout=120).stdout
            for command in ([str(tools / "cuobjdump"), "-res-usage"], [str(tools / "nvdisasm"), "-c"])
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    products, multiply_adds = (len(re.findall(rf"\b{name}\b", code)) for name in ("(?:H|HG|UTCH)MMA", "FFMA2?"))
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, products, multiply_adds)


def launches(H: int, A: int, direction: str, bf16: bool, capability: int) -> Iterator[tuple[int, Launch]]:
    """Every launch that the tile table can choose for a width, with a number of rows that it is chosen for."""
    seen = set()
    for rows in ROWS:
        made = launch(direction, rows, H, A, bf16, capability)
        settings = *sorted((name, str(value)) for name, value in made.constants.items()), made.warps, made.stages
        if settings not in seen:
            seen.add(settings)
            yield rows, made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the Triton kernels.")
    parser.add_argument("--width", type=int, nargs="*", default=[64, 256, 512], help="hidden widths")
    parser.add_argument("--actions", type=int, default=4, help="action size")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, {arguments.actions} actions\n")
    print(
        "| kernel | width | rows from | tile (BM, BK, BN) | warps | target | registers | spilled, bytes | shared, KiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for H, capability, direction, bf16 in itertools.product(
        arguments.width, TARGETS, ("forward", "backward"), (True, False)
    ):
        for rows, made in launches(H, arguments.actions, direction, bf16, capability):
            tile = ", ".join(str(made.constants[name]) for name in ("BM", "BK", "BN"))
            taken = usage(made, capability)
            print(
                f"| {direction} {'bf16' if bf16 else 'fp32'} | {H} | {rows} | {tile} | {made.warps} | sm_{capability} "
                f"| {taken.registers} | {taken.stack} | {taken.shared / 1024:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
