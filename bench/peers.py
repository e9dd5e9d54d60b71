"""The peers: Diffusion-QL (Wang et al. 2023) as its users run it, in eager PyTorch and under `torch.compile`.

Written here, from the paper and from what the public implementation is known to do: at every denoising step it embeds
the time of every row, concatenates [a, t, condition], gathers the schedule's coefficients by row, and draws its noise
by `torch.randn`. The condition is [s], or [s, z] where there is a prompt. Nothing is precomputed.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from counting import Sizes
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.diffusion import NoiseMLP, alphas
from llmdpd.errors import InputError

Randn = Callable[[tuple[int, int], torch.device], Tensor]
# Compiled as one up to here; beyond, one denoising step is: unrolling a hundred takes minutes.
WHOLE_CHAIN = 15


class TimeEmbedding(nn.Module):
    """Sine and cosine of the time index of every row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=time.device) * -(math.log(10000) / (half - 1)))
        phase = time[:, None] * frequencies[None, :]
        return torch.cat((phase.sin(), phase.cos()), dim=-1)


def _hidden_layers(inputs: int, hidden: int) -> nn.Sequential:
    parts = [layer for width in (inputs, hidden, hidden) for layer in (nn.Linear(width, hidden), nn.Mish())]
    return nn.Sequential(*parts)


class Model(nn.Module):
    """epsilon(a, t, condition). Its parameters are named as in the public code; see `noise_mlp`."""

    def __init__(self, condition_dim: int, action_dim: int, hidden: int, time_dim: int = 16) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            TimeEmbedding(time_dim), nn.Linear(time_dim, time_dim * 2), nn.Mish(), nn.Linear(time_dim * 2, time_dim)
        )
        self.mid_layer = _hidden_layers(condition_dim + action_dim + time_dim, hidden)
        self.final_layer = nn.Linear(hidden, action_dim)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        t = self.time_mlp(time)
        out: Tensor = self.final_layer(self.mid_layer(torch.cat([x, t, condition], dim=1)))
        return out


def noise_mlp(state_dict: Mapping[str, Tensor], state_dim: int, action_dim: int, prompt_dim: int) -> NoiseMLP:
    """A net with the weights of the public Diffusion-QL code's `MLP`, whose condition is [state, prompt].

    Its names are `time_mlp.{1,3}`, `mid_layer.{0,2,4}` and `final_layer`; a prefix such as `model.` is allowed.

    Raises:
        InputError: a missing tensor, or sizes that do not fit `state_dim`, `action_dim` and `prompt_dim`.
    """
    names = {"time_mlp.1": "time_mlp.1", "time_mlp.3": "time_mlp.3", "final_layer": "layers.3"}
    names |= {f"mid_layer.{2 * i}": f"layers.{i}" for i in range(3)}
    last = "final_layer.weight"
    prefix = next((key.removesuffix(last) for key in state_dict if key.endswith(last)), "")
    ours: dict[str, Tensor] = {}
    for (theirs, name), part in itertools.product(names.items(), ("weight", "bias")):
        key = f"{prefix}{theirs}.{part}"
        if key not in state_dict:
            raise InputError("not a Diffusion-QL network", field=key, found="no such tensor", expected="a tensor")
        ours[f"{name}.{part}"] = state_dict[key]
    time_dim, hidden_dim = ours["time_mlp.3.bias"].shape[0], ours["layers.0.bias"].shape[0]
    net = NoiseMLP(state_dim, action_dim, prompt_dim, hidden_dim, time_dim)
    for key, value in net.state_dict().items():
        found, expected = tuple(ours[key].shape), tuple(value.shape)
        if found != expected:
            raise InputError("a tensor of another size", field=key, found=found, expected=expected)
    net.load_state_dict(ours)
    return net


def _gather(values: Tensor, time: Tensor) -> Tensor:
    """The coefficient of every row's time index, [B, 1]."""
    return values.gather(-1, time).reshape(time.shape[0], 1)


class Diffusion(nn.Module):
    """The actor: DDPM with K = `steps` under the variance-preserving schedule, actions in ±1."""

    sqrt_bar: Tensor
    sqrt_one_minus_bar: Tensor
    sqrt_recip_bar: Tensor
    sqrt_recip_bar_minus_one: Tensor
    log_variance: Tensor
    mean_of_start: Tensor
    mean_of_now: Tensor

    def __init__(self, condition_dim: int, action_dim: int, hidden: int = 256, steps: int = 5) -> None:
        super().__init__()
        self.model = Model(condition_dim, action_dim, hidden)
        self.action_dim, self.steps = action_dim, steps
        self.randn: Randn = lambda shape, device: torch.randn(shape, device=device)
        alpha = torch.from_numpy(alphas("vp", steps))
        bar = torch.cumprod(alpha, 0)
        before = torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
        variance = (1 - alpha) * (1 - before) / (1 - bar)
        buffers = {
            "sqrt_bar": bar.sqrt(),
            "sqrt_one_minus_bar": (1 - bar).sqrt(),
            "sqrt_recip_bar": (1 / bar).sqrt(),
            "sqrt_recip_bar_minus_one": (1 / bar - 1).sqrt(),
            "log_variance": variance.clamp(min=1e-20).log(),
            "mean_of_start": (1 - alpha) * before.sqrt() / (1 - bar),
            "mean_of_now": (1 - before) * alpha.sqrt() / (1 - bar),
        }
        for name, values in buffers.items():
            self.register_buffer(name, values.to(torch.get_default_dtype()))

    def _predict_start_from_noise(self, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        return _gather(self.sqrt_recip_bar, time) * x - _gather(self.sqrt_recip_bar_minus_one, time) * noise

    def _mean_and_log_variance(self, x: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        start = self._predict_start_from_noise(x, time, self.model(x, time, condition)).clamp(-1.0, 1.0)
        mean = _gather(self.mean_of_start, time) * start + _gather(self.mean_of_now, time) * x
        return mean, _gather(self.log_variance, time)

    def denoise(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """One step of the chain."""
        mean, log_variance = self._mean_and_log_variance(x, time, condition)
        noise = self.randn((x.shape[0], self.action_dim), x.device)
        nonzero = (1 - (time == 0).to(x.dtype)).reshape(x.shape[0], 1)
        return mean + nonzero * (0.5 * log_variance).exp() * noise

    def sample(self, condition: Tensor) -> Tensor:
        """Condition [B, C] → actions [B, A] by the whole chain."""
        batch = condition.shape[0]
        x = self.randn((batch, self.action_dim), condition.device)
        for index in reversed(range(self.steps)):
            time = torch.full((batch,), index, device=condition.device, dtype=torch.long)
            x = self.denoise(x, time, condition)
        return x.clamp(-1.0, 1.0)

    def loss(self, actions: Tensor, condition: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, at a time index drawn for each row."""
        time = torch.randint(0, self.steps, (actions.shape[0],), device=actions.device)
        noise = torch.randn_like(actions)
        noisy = _gather(self.sqrt_bar, time) * actions + _gather(self.sqrt_one_minus_bar, time) * noise
        return F.mse_loss(self.model(noisy, time, condition), noise)


class Critic(nn.Module):
    """Q_1 and Q_2 (s, a)."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 256) -> None:
        super().__init__()

        self.q1, self.q2 = (
            _hidden_layers(state_dim + action_dim, hidden).append(nn.Linear(hidden, 1)) for _ in range(2)
        )

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=-1)
        return self.q1(x), self.q2(x)

    def q_min(self, state: Tensor, action: Tensor) -> Tensor:
        """The lower of both, [B, 1]."""
        return torch.min(*self(state, action))


class Compiler:
    """How the compiled peers are compiled: once a shape.

    The mode is what PyTorch recommends for small networks: the default one on a CPU, `reduce-overhead` (CUDA graphs) on
    a GPU. `backend` is inductor, or `eager` where a test only wants to see that everything runs.
    """

    def __init__(self, device: torch.device, backend: str = "inductor") -> None:
        self.graphs = device.type == "cuda" and backend == "inductor"
        self._options: dict[str, Any] = {"backend": backend, "dynamic": False}
        if self.graphs:
            self._options["mode"] = "reduce-overhead"

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled; each call begins an iteration of its CUDA graph."""
        compiled: Callable[..., Any] = torch.compile(function, **self._options)
        return compiled

    def mark(self) -> None:
        """Say that what the graphs returned before is no longer needed."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()


def compiled_sample(actor: Diffusion, compiler: Compiler) -> Callable[[Tensor], Tensor]:
    """`actor.sample` compiled: the whole chain, or for a long one its step (see `WHOLE_CHAIN`)."""
    if actor.steps <= WHOLE_CHAIN:
        whole = compiler.compile(actor.sample)
    else:
        stepped = copy.copy(actor)
        stepped.denoise = compiler.compile(actor.denoise)  # type: ignore[method-assign]
        whole = stepped.sample

    def sample(condition: Tensor) -> Tensor:
        compiler.mark()
        actions: Tensor = whole(condition)
        return actions

    return sample


class Acting:
    """One action a state, chosen among `samples` draws by softmax over min Q; numpy to numpy.

    Args:
        sizes: of the networks. device: where they run. steps: K.
        compiler: compiles everything from the tensor of states on; None for eager.
        autocast: run the networks in bfloat16.
    """

    def __init__(
        self, sizes: Sizes, device: torch.device, steps: int, samples: int, compiler: Compiler | None, autocast: bool
    ) -> None:
        self.device, self.samples, self.autocast = device, samples, autocast
        self.actor = Diffusion(sizes.state + sizes.prompt, sizes.action, sizes.hidden, steps).to(device)
        self.critic = Critic(sizes.state, sizes.action, sizes.hidden).to(device)
        self.prompt = torch.randn(sizes.prompt, device=device)
        self.compiler = compiler
        self._choose = compiler.compile(self.choose) if compiler else self.choose

    def choose(self, state: Tensor) -> Tensor:
        """States [B, S] → actions [B, A]."""
        batch = state.shape[0]
        repeated = torch.repeat_interleave(state, self.samples, dim=0)
        condition = torch.cat([repeated, self.prompt.expand(repeated.shape[0], -1)], dim=1)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            actions = self.actor.sample(condition)
            value = self.critic.q_min(repeated, actions).reshape(batch, self.samples).float()
        index = torch.multinomial(F.softmax(value, dim=1), 1)
        return actions.reshape(batch, self.samples, -1)[torch.arange(batch, device=self.device), index[:, 0]]

    def act(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Observation [S] → [A], or [B, S] → [B, A]."""
        state = torch.as_tensor(observation, dtype=torch.float32).reshape(-1, observation.shape[-1]).to(self.device)
        with torch.no_grad():
            if self.compiler:
                self.compiler.mark()
            actions: NDArray[np.float32] = self._choose(state).float().cpu().numpy()
        return actions[0] if observation.ndim == 1 else actions


class Trainer:
    """Diffusion-QL's training iteration.

    With a compiler its two losses are compiled, forward and backward, its Adam is torch's fused one, and its averages
    are updated by `foreach`: the best that its user gets without writing kernels.

    Args:
        sizes: of the networks, without a prompt.
        device: where it runs. steps: K.
        compiler: see above; None for eager.
        autocast: run the networks in bfloat16.
    """

    GAMMA, TAU, ETA, EMA_DECAY, EMA_EVERY, EMA_START, GRAD_NORM, LR = 0.99, 0.005, 1.0, 0.995, 5, 1000, 9.0, 3e-4

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        steps: int = 5,
        compiler: Compiler | None = None,
        autocast: bool = False,
    ) -> None:
        self.device, self.compiler, self.autocast = device, compiler, autocast
        self.actor = Diffusion(sizes.state, sizes.action, sizes.hidden, steps).to(device)
        self.ema = copy.deepcopy(self.actor)
        self.critic = Critic(sizes.state, sizes.action, sizes.hidden).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=self.LR, fused=compiler is not None or None)
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=self.LR, fused=compiler is not None or None
        )
        compiled = compiler.compile if compiler else (lambda function: function)
        self._critic_loss, self._actor_loss = compiled(self.critic_loss), compiled(self.actor_loss)
        self.step = self.EMA_START  # past the iterations in which the average rests

    def critic_loss(
        self, state: Tensor, action: Tensor, next_state: Tensor, reward: Tensor, not_done: Tensor
    ) -> Tensor:
        """Both critics against r + gamma (1 - terminal) min Q of the averaged actor's action; [B, ·], reward [B, 1]."""
        with self._mixed():
            q1, q2 = self.critic(state, action)
            value = self.critic_target.q_min(next_state, self.ema.sample(next_state))
        target = (reward + not_done * self.GAMMA * value).detach()
        return F.mse_loss(q1, target.to(q1.dtype)) + F.mse_loss(q2, target.to(q2.dtype))

    def actor_loss(self, state: Tensor, action: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The diffusion loss plus eta times the normalised Q loss: their sum, and each."""
        with self._mixed():
            cloning = self.actor.loss(action, state)
            q1, q2 = self.critic(state, self.actor.sample(state))
        chosen, other = (q1, q2) if first else (q2, q1)
        q_loss = -chosen.mean() / other.abs().mean().detach()
        return cloning + self.ETA * q_loss, cloning, q_loss

    def train_step(
        self,
        state: Tensor,
        action: Tensor,
        next_state: Tensor,
        reward: Tensor,
        not_done: Tensor,
        first: bool | None = None,
    ) -> dict[str, float]:
        """One iteration; `first`: which critic the actor climbs, by default a random one. The metrics as numbers."""
        if self.compiler:
            self.compiler.mark()
        critic_loss = self._critic_loss(state, action, next_state, reward, not_done)
        self._update(critic_loss, self.critic, self.critic_optimizer)
        metrics = {"critic": critic_loss.item()}
        first = bool(np.random.uniform() > 0.5) if first is None else first
        loss, cloning, q_loss = self._actor_loss(state, action, first)
        self._update(loss, self.actor, self.actor_optimizer)
        if self.step % self.EMA_EVERY == 0 and self.step >= self.EMA_START:
            self._average(self.ema, self.actor, 1 - self.EMA_DECAY)
        self._average(self.critic_target, self.critic, self.TAU)
        self.step += 1
        return {**metrics, "actor": loss.item(), "cloning": cloning.item(), "q": q_loss.item()}

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def _update(self, loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.GRAD_NORM)
        optimizer.step()

    @torch.no_grad()
    def _average(self, target: nn.Module, source: nn.Module, rate: float) -> None:
        if self.compiler:
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
            return
        for old, new in zip(target.parameters(), source.parameters(), strict=True):
            old.data.copy_(rate * new.data + (1 - rate) * old.data)
