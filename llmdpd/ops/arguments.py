"""What the fused operations are called with.

Symbols, the same in PyTorch, C++ and Triton (k = K first, the paper's equations 4 and 5):

    u       = W_s s + u_z,  u_z = W_z z + b1                            context [B, H]
    tau_k   = W_t time(k)                                               time row [K, H]
    h1      = mish(u + tau_k + W_a a_k)
    epsilon = W4 mish(W3 mish(W2 h1 + b2) + b3) + b4                    trunk
    x0      = clip(p_k a_k + e_k epsilon)
    a_{k-1} = A_k a_k + B_k x0 + C_k x0_previous + S_k xi_k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError

Precision = Literal["fp32", "bf16"]

MAX_ROWS = 1 << 32  # the row is one 32-bit word of the noise's counter
MAX_SAMPLES = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class SamplerCoefficients:
    """The coefficients of a reverse chain, one row for each step in the order of use (k = K first).

    `timesteps` [K] int64 are the network's time indices (0 … train_steps - 1); `p, e, A, B, C, S` [K] float64 are the
    coefficients of the module's recurrence; `clip` bounds x0 at every step and a_0 (None: no bound). The chain starts
    at `start` times the first noise; `start` and S carry the noise scale. All callers of
    `llmdpd.diffusion.sampler_coefficients` with the same arguments share one object, so its arrays are read-only.
    """

    name: str
    schedule: str
    train_steps: int
    clip: float | None
    start: float
    timesteps: NDArray[np.int64]
    p: NDArray[np.float64]
    e: NDArray[np.float64]
    A: NDArray[np.float64]
    B: NDArray[np.float64]
    C: NDArray[np.float64]
    S: NDArray[np.float64]
    content: bytes = field(init=False, repr=False)
    """`timesteps` and `table()`: what torch.compile, which takes no such object for a constant, knows a chain by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", self.timesteps.astype(np.int64).tobytes() + self.table().tobytes())

    @property
    def steps(self) -> int:
        """Number of denoising steps K."""
        return len(self.timesteps)

    @property
    def bound(self) -> float:
        """`clip`, infinity where there is none."""
        return float("inf") if self.clip is None else self.clip

    def table(self) -> NDArray[np.float32]:
        """The coefficients as the kernels read them: float32 [K, 6], columns p, e, A, B, C, S."""
        return np.stack([self.p, self.e, self.A, self.B, self.C, self.S], axis=1).astype(np.float32)

    @staticmethod
    def read(content: bytes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The timesteps [K] and the table [K, 6] of a `content`."""
        steps = len(content) // 32
        return np.frombuffer(content, np.int64, steps), np.frombuffer(
            content, np.float32, 6 * steps, 8 * steps
        ).reshape(-1, 6)


class NoiseNetwork(Protocol):
    """The noise network epsilon(a_k, s, z, k) as the operations see it; `llmdpd.diffusion.NoiseMLP` is one."""

    state_dim: int
    action_dim: int
    prompt_dim: int
    time_dim: int
    time_mlp: nn.Sequential

    @property
    def linears(self) -> list[nn.Linear]: ...


class ChainArguments(NamedTuple):
    """One call of the reverse chain, in the order of the registered operator's arguments.

    The result is a_0 [B, N, A]; it is differentiable in the first six.
    """

    state: Tensor  # s [B, S]
    W_s: Tensor  # [H, S]
    u_z: Tensor  # W_z z + b1: [H], or [B, H] where each state has a prompt of its own
    tau: Tensor  # [K, H]
    W_a: Tensor  # [H, A]
    trunk: Sequence[Tensor]  # W2, b2, W3, b3, W4, b4
    table: Tensor  # p, e, A, B, C, S: float32 [K, 6]
    key: Tensor  # of the counter-based noise: int64 [1], or [B], one for each state
    noise: Tensor | None  # xi [K + 1, B, N, A] instead of a key, the start first
    start: float  # factor on the start noise
    clip: float  # bound on x0 and a_0; infinity for none
    samples: int  # N, actions for each state
    bf16: bool  # whether the trunk's matrix products are computed in bfloat16


class MlpArguments(NamedTuple):
    """One call of the three-layer net W4 mish(W3 mish(W2 mish(W1 x + init) + b2) + b3) + b4 → [B, O]."""

    x: Tensor  # [B, I]
    input_weight: Tensor  # W1 [H, I]
    init: Tensor  # [H] or [B, H]
    trunk: Sequence[Tensor]  # W2, b2, W3, b3, W4, b4
    bf16: bool


def check_shapes(net: NoiseNetwork, state: Tensor, prompt: Tensor, samples: int) -> int:
    """The batch size B of state [B, S] and prompt [Z] or [B, Z].

    Raises:
        InputError: a shape or a number of samples that does not fit the network.
    """
    if not 1 <= samples <= MAX_SAMPLES:
        raise InputError("wrong number of actions a state", field="samples", found=samples, expected="1 to 2^31 - 1")
    if state.ndim != 2 or state.shape[1] != net.state_dim:
        raise InputError("wrong shape", field="state", found=tuple(state.shape), expected=f"[B, {net.state_dim}]")
    batch = state.shape[0]
    if batch * samples > MAX_ROWS:
        most = f"{MAX_ROWS} at most"
        raise InputError("too many actions for one call", field="samples", found=batch * samples, expected=most)
    if tuple(prompt.shape) not in {(net.prompt_dim,), (batch, net.prompt_dim)}:
        expected = f"[{net.prompt_dim}] or [{batch}, {net.prompt_dim}]"
        raise InputError("wrong shape", field="prompt", found=tuple(prompt.shape), expected=expected)
    return batch


def check_seed(seed: object, batch: int) -> None:
    """Raise `InputError` for a seed that is neither None, nor an integer, nor int64 [B]."""
    if isinstance(seed, Tensor):
        fits, found = seed.shape == (batch,) and seed.dtype == torch.int64, f"{seed.dtype} {tuple(seed.shape)}"
    else:
        fits, found = seed is None or isinstance(seed, SupportsIndex), repr(seed)
    if not fits:
        raise InputError("wrong kind of seed", field="seed", found=found, expected=f"an int, or int64 [{batch}]")
