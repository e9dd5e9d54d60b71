"""The whole action as one module of plain PyTorch: what is traced for other runtimes.

It computes what `llmdpd.nn.context`, the reverse chain and the choice among samples do, from the tables and weights
that the C++ code takes (`ContextParts`), with the prompt as constants and no operators of this package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.diffusion.reference import walk_chain
from llmdpd.export.contents import context_parts, exportable
from llmdpd.nn.context import EncodedPrompts
from llmdpd.ops.packing import ContextParts, Table
from llmdpd.policy.policy import Policy

_CLIP = 10.0
_NEARNESS = 6.0
_EPSILON = 1e-5


class Action(nn.Module):
    """Observations, time steps and noise → the actions of a prompted policy, in the environment's own numbers.

    Args:
        policy: acting as it is to act. prompts: its one prompt, encoded.

    Raises:
        InputError: as `exportable`.
    """

    centre: Tensor
    reach: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policy: Policy, prompts: EncodedPrompts) -> None:
        super().__init__()
        network, acting = exportable(policy)
        parts = context_parts(network, prompts)
        self.chunk, self.action_dim = network.config.chunk, network.action_dim
        self.coefficients = acting.coefficients(network.config)
        self.context = _Context(parts)
        self.chain = _Chain(network.net, parts.pooled[0], self.coefficients)
        self.samples = acting.samples if policy.critic is not None else 1
        self.choice = _Choice(policy.critic, parts.pooled[0], acting) if self.samples > 1 else None
        self.remembered = list(network.spaces.remembered)
        self.scaled = not network.action_scaling.identity
        if self.scaled:
            centre, half, low, high = torch.from_numpy(network.action_scaling.parts())
            for name, tensor in {"centre": centre, "reach": half, "low": low.float(), "high": high.float()}.items():
                self.register_buffer(name, tensor)

    @property
    def needs_choice(self) -> bool:
        """Whether a number decides among several samples: of a choice by softmax."""
        return self.choice is not None and self.choice.temperature is not None

    def forward(
        self,
        observation: Tensor,
        step: Tensor,
        noise: Tensor,
        before: Tensor | None = None,
        choice: Tensor | None = None,
    ) -> Tensor:
        """Observations [B, O] at time steps int64 [B] → chunks of actions [B, H, A]; H is 1 without chunks.

        Args:
            observation: as the environment gives them. step: within the episodes.
            noise: standard normal [K + 1, B, N, H A], the start's first, then a draw a step.
            before: the observations one step before [B, O], an episode's first being its own; of policies that
                remember some of them. choice: standard normal [B], by which one of N samples is taken.
        """
        state = observation
        if self.remembered:
            assert before is not None
            state = torch.cat([observation, before[:, self.remembered]], dim=1)
        condition = self.context(state, step)
        actions = self.chain(condition, noise)
        chosen = actions[:, 0] if self.choice is None else self.choice(condition, actions, choice)
        chunks = chosen.reshape(-1, self.chunk, self.action_dim)
        if not self.scaled:
            return chunks
        scaled = (self.centre + self.reach * chunks.double()).float()
        return torch.minimum(torch.maximum(scaled, self.low), self.high)


class _Features(nn.Module):
    """A table of `llmdpd.nn.feature_table` as a function of states [B, S] and which points are present [B, P]."""

    one: Tensor
    other: Tensor
    present: Tensor
    scale: Tensor
    offset: Tensor
    normalised: Tensor
    difference: Tensor
    near: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        kinds, numbers = torch.from_numpy(table[0]).long(), torch.from_numpy(table[1])
        self.kinds = set(kinds[:, 0].tolist())
        for name, column in {"one": kinds[:, 1], "other": kinds[:, 2]}.items():
            self.register_buffer(name, column)
        # The last column of those that are present always is: 0 and 1 stand for no point, and for any.
        self.register_buffer("present", kinds[:, 3:])
        self.register_buffer("scale", numbers[:, 0])
        self.register_buffer("offset", numbers[:, 1])
        self.guarded = bool((kinds[:, 3:] >= 0).any())
        for name, kind in {"normalised": 1, "difference": 2, "near": 3}.items():
            self.register_buffer(name, kinds[:, 0] == kind)

    def forward(self, state: Tensor, present: Tensor | None) -> Tensor:
        one = state[:, self.one]
        found = self.scale * one
        if 1 in self.kinds:
            normalised = ((one - self.offset) / self.scale).clamp(-_CLIP, _CLIP)
            found = torch.where(self.normalised, normalised, found)
        if self.kinds & {2, 3}:
            away = self.scale * (state[:, self.other] - one)
            if self.guarded and present is not None:
                away = away * present[:, self.present[:, 0]] * present[:, self.present[:, 1]]
            found = torch.where(self.difference, away, found)
            if 3 in self.kinds:
                found = torch.where(self.near, torch.tanh(away), found)
        return found


class _Context(nn.Module):
    """The condition's state part [B, F] of states [B, S] at time steps [B], and its prompt as constants."""

    periods: Tensor | None

    def __init__(self, parts: ContextParts) -> None:
        super().__init__()
        self.own, self.geometry = _Features(parts.own), _Features(parts.geometry)
        self.points = [list(point) for point in parts.points]
        self.heads, self.lookaheads, self.action_dim = parts.heads, parts.lookaheads, parts.action_dim
        self.time_unit = parts.time_unit
        self.register_buffer("periods", torch.tensor(parts.periods) if parts.periods else None)
        self.weights = {name: f"w_{name.replace('.', '_')}" for name in parts.weights}
        for name, tensor in parts.weights.items():
            self.register_buffer(self.weights[name], tensor.clone())
        self.memory = {name: f"m_{name}" for name in parts.memory}
        for name, tensor in parts.memory.items():
            self.register_buffer(self.memory[name], tensor[0].clone())
        self.layers = sum(name.endswith(".out.weight") for name in parts.weights)

    def forward(self, state: Tensor, step: Tensor) -> Tensor:
        present = self._present(state)
        streams = [self.own(state, present)]
        if self.periods is not None:
            angle = 2 * math.pi * step[:, None].to(self.periods.dtype) / self.periods
            streams += [angle.sin(), angle.cos()]
        own = torch.cat(streams, dim=1)
        if not self.weights:
            return own
        weight = self._weight("query")
        hidden = F.linear(own, weight[:, : own.shape[1]]) + self._memory("query_init")
        for number in range(self.layers):
            hidden = self._attend(hidden, number)
        parts = [own]
        if "norm.weight" in self.weights:
            parts.append(self._norm(hidden, "norm"))
        if "waypoint_query.weight" in self.weights:
            parts.append(self._retrieve(hidden, self._place(state, present, step)))
        return torch.cat(parts, dim=1)

    def _present(self, state: Tensor) -> Tensor | None:
        """1.0 for points with a number that is not zero, and 1 for what is no point, [B, P + 1]; -1 indexes that."""
        if not self.points:
            return None
        found = [(state[:, point] != 0).any(1, keepdim=True) for point in self.points]
        return torch.cat([*found, torch.ones_like(found[0])], dim=1).to(state.dtype)

    def _place(self, state: Tensor, present: Tensor | None, step: Tensor) -> Tensor:
        geometry: Tensor = self.geometry(state, present)
        if self.periods is None:
            return geometry
        return torch.cat([geometry, step[:, None].to(geometry.dtype) / self.time_unit], dim=1)

    def _attend(self, hidden: Tensor, number: int) -> Tensor:
        layer = f"layers.{number}."
        query = self._split(self._linear(self._norm(hidden, layer + "query_norm"), layer + "query"))
        key, value = self._memory(f"key{number}"), self._memory(f"value{number}")
        score = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1]) + self._memory("bias")
        found = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)[:, 0]
        hidden = hidden + self._linear(found, layer + "out")
        wide = F.gelu(self._linear(self._norm(hidden, layer + "forward_norm"), layer + "widen"))
        return hidden + self._linear(wide, layer + "narrow")

    def _retrieve(self, hidden: Tensor, here: Tensor) -> Tensor:
        query, key = self._split(self._linear(hidden, "waypoint_query")), self._memory("waypoint_key")
        score = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1]) + self._memory("waypoint_bias")
        if "there" in self.memory and "likeness" in self.weights:
            apart = (here[:, None] - self._memory("there")).square() @ self._buffer(self.weights["likeness"]).T
            score = score - apart.transpose(1, 2)[:, :, None]
        weight = score.softmax(-1)[:, :, 0]  # [B, heads, T]
        found = weight @ self._memory("waypoints")
        action, there = found[..., : self.action_dim], found[..., self.action_dim :]
        seen = 1 - weight[..., -1:]
        count = there.shape[-1] // self.lookaheads if self.lookaheads else 0
        away = there - seen * here[:, :count].repeat(1, self.lookaheads)[:, None]
        return torch.cat([action, away, torch.tanh(_NEARNESS * away)], dim=-1).flatten(1)

    def _split(self, vectors: Tensor) -> Tensor:
        """[B, W] → [B, heads, 1, W / heads]."""
        return vectors.unflatten(1, (self.heads, 1, -1))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(name)
        return F.layer_norm(x, weight.shape, weight, self._buffer(self.weights[f"{name}.bias"]), _EPSILON)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weight(name), self._buffer(self.weights[f"{name}.bias"]))

    def _weight(self, name: str) -> Tensor:
        return self._buffer(self.weights[f"{name}.weight"])

    def _memory(self, name: str) -> Tensor:
        return self._buffer(self.memory[name])

    def _buffer(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor


class _Chain(nn.Module):
    """The reverse chain from a condition [B, F] and noise [K + 1, B, N, H A], under one prompt: [B, N, H A]."""

    W_a: Tensor
    W_s: Tensor
    u_z: Tensor
    tau: Tensor

    def __init__(self, net: Any, prompt: Tensor, coefficients: Any) -> None:
        super().__init__()
        self.coefficients = coefficients
        W_a, _, W_s, W_z, b1 = net.first_layer()
        constants = {"W_a": W_a, "W_s": W_s, "u_z": F.linear(prompt, W_z, b1)}
        constants["tau"] = net.time_rows(torch.tensor(coefficients.timesteps))
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.detach().clone())
        self.trunk = nn.ModuleList(net.linears[1:])

    def forward(self, condition: Tensor, noise: Tensor) -> Tensor:
        u = (F.linear(condition, self.W_s) + self.u_z)[:, None]

        def epsilon(actions: Tensor, k: int) -> Tensor:
            hidden = F.mish(F.linear(actions, self.W_a) + (u + self.tau[k]))
            for layer in list(self.trunk)[:-1]:
                hidden = F.mish(layer(hidden))
            found: Tensor = self.trunk[-1](hidden)
            return found

        return walk_chain(self.coefficients, noise, epsilon)


class _Choice(nn.Module):
    """One of N actions [B, N, A] by min(Q_1, Q_2), [B, A]."""

    prompt: Tensor | None

    def __init__(self, critic: Any, prompt: Tensor, acting: Any) -> None:
        super().__init__()
        self.q1, self.q2 = critic.q1, critic.q2
        self.temperature = acting.temperature if acting.selection == "soft" else None
        self.register_buffer("prompt", prompt if critic.prompt_dim else None)

    def forward(self, condition: Tensor, actions: Tensor, normal: Tensor | None) -> Tensor:
        samples = actions.shape[1]
        parts = [condition[:, None].expand(-1, samples, -1), actions]
        if self.prompt is not None:
            parts.append(self.prompt.expand(actions.shape[0], samples, -1))
        joined = torch.cat(parts, dim=-1)
        value = torch.minimum(self.q1(joined), self.q2(joined))[..., 0]
        if self.temperature is None:
            choice = value.argmax(1)
        else:
            assert normal is not None
            # In the noise's own precision: onnxruntime has no other.
            uniform = (0.5 * torch.erfc(-normal / math.sqrt(2.0))).double()
            probability = (value.double() / self.temperature).softmax(1)
            cumulative = probability @ torch.ones(samples, samples, dtype=torch.float64).triu()
            choice = (cumulative < uniform[:, None]).sum(1).clamp_max(samples - 1)
        return actions.gather(1, choice[:, None, None].expand(-1, 1, actions.shape[2]))[:, 0]
