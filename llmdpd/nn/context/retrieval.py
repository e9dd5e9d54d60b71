"""A context that attends to the demonstration step by step, instead of reading it as one vector.

It has four parts beside the paper's vectors, each a switch of `RetrievalConfig`: attention from the state to the
encoded steps of the demonstration; retrieved waypoints, an attention whose values are raw (the action at the most
similar moment of the demonstration, and how far the state is from the demonstrated ones), by geometric similarity too;
and a timestep embedding. Augmentation of the geometry in training (`llmdpd.data.augmentation`) makes reading the
demonstration the only way to know what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.nn import device_features
from llmdpd.nn.context.base import ALL_KEPT, Condition, Context, ContextConfig, EncodedPrompts, Keep, spread
from llmdpd.nn.context.native import ContextInputs
from llmdpd.nn.feature_table import feature_tables
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_memory, device_reading, layers, native
from llmdpd.ops.nodes import Weights, device_parameters, parameters
from llmdpd.ops.packing import ContextParts
from llmdpd.ops.reading import ContextShape, Seen, read_prompts, read_states
from llmdpd.prompts.demonstration import TrajectoryTokens

_PERIODS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
"""Periods of the timestep embedding's waves, in time steps: from the length of a grasp to that of an episode."""
_TIME_UNIT = 50.0
_NEARNESS = 6.0
_LOOKS = ("query", "layers", "norm", "waypoint_query", "likeness")
"""Of the state's parts, those that look into a demonstration that was read before."""
_SIMILARITY_SCALES = (-1.0, 3.0)
"""Logarithms of the scales, a square of 25 cm, that the first and the last head start with."""


class RetrievalContext(Context):
    """Pooled prompt vectors, attention to the demonstration, waypoints, timestep embedding; see `Context`."""

    periods: Tensor

    def __init__(self, spaces: Spaces, config: ContextConfig) -> None:
        super().__init__(spaces, config)
        sizes = config.retrieval
        self.sizes, self.action_dim = sizes, spaces.action_dim
        self.register_buffer("periods", torch.tensor(_PERIODS), persistent=False)
        features = self.features.output_dim
        embedding = 2 * len(_PERIODS) if sizes.timestep_embedding else 0
        self.state_dim = features + embedding
        self.reads = config.trajectory and (sizes.attention or sizes.waypoints)
        self.retrieves = self.reads and sizes.waypoints
        if not self.reads:
            return
        width = sizes.width
        text = config.text_dim if config.text else 0
        self.query = nn.Linear(features + embedding + text, width)
        self.step = nn.Linear(config.encoder.width + embedding, width)
        # What is attended to where no demonstration is given, and where none of its steps says anything.
        self.nothing = nn.Parameter(torch.zeros(width))
        depth = sizes.layers if sizes.attention else 0
        self.layers: Iterable[AttentionLayer] = nn.ModuleList(  # type: ignore[assignment]
            AttentionLayer(width, sizes.heads) for _ in range(depth)
        )
        if sizes.attention:
            self.norm = nn.LayerNorm(width)
            self.state_dim += width
        if sizes.waypoints:
            self.waypoint_query = nn.Linear(width, width)
            self.waypoint_key = nn.Linear(width, width)
            if sizes.geometric_similarity:
                compared = self.features.geometry_dim + sizes.timestep_embedding
                # Heads begin with scales of their own, so that they are no copies of each other.
                start = torch.linspace(*_SIMILARITY_SCALES, sizes.heads)[:, None].expand(-1, compared)
                self.likeness = nn.Parameter(start.clone())
            geometry = self.features.geometry_dim * len(sizes.lookahead)
            self.state_dim += sizes.heads * (spaces.action_dim + 2 * geometry)
        self._shape = ContextShape(
            text=config.text,
            encoder_layers=config.encoder.layers,
            encoder_heads=config.encoder.heads,
            layers=depth,
            heads=sizes.heads,
            waypoints=sizes.waypoints,
            similarity=sizes.waypoints and sizes.geometric_similarity,
            action_dim=spaces.action_dim,
            geometry=self.features.geometry_dim,
        )
        self._prompt_weights, self._state_weights = self._shape.prompt_weights(), self._shape.state_weights()

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None, keep: Keep = ALL_KEPT) -> EncodedPrompts:
        weights, encoder = self._weights_for_prompts(text, tokens), self.trajectory_encoder
        if weights is None or tokens is None or encoder is None:
            return super().encode(text, tokens, keep)
        inputs = self.inputs()
        arrays = inputs.new_prompts(*tokens.mask.shape)
        inputs.write_prompts(tokens, keep.trajectory, arrays)
        said = text if self.config.text else None
        given = [None if part is None else part.float() for part in (said, keep.text, keep.trajectory)]
        shown = arrays.shown(*(None if part is None else native.array(part) for part in given))
        pooled, *rows = read_prompts(self._shape, shown, weights, [part for part in given if part is not None])
        memory = {"bias": torch.from_numpy(arrays.step_bias)[:, None, None]}
        if arrays.waypoint_bias is not None and arrays.waypoints is not None:
            memory["waypoint_bias"] = torch.from_numpy(arrays.waypoint_bias)[:, None, None]
            memory["waypoints"] = torch.from_numpy(arrays.waypoints)[:, None]
        if arrays.there is not None:
            memory["there"] = torch.from_numpy(arrays.there)
        return EncodedPrompts(pooled, memory | dict(zip(self._row_names, rows, strict=True)))

    def remember(
        self, pooled: Tensor, steps: Tensor | None, tokens: TrajectoryTokens | None, given: Tensor | None
    ) -> dict[str, Tensor]:
        """Keys and values of every attention, [P, T + 1, W]; the last step is the one that says nothing."""
        if not self.reads:
            return {}
        sizes, prompts = self.sizes, len(pooled)
        own, there = (None, None) if tokens is None else self._seen(tokens.states, tokens.times)
        memory: dict[str, Tensor] = {}
        if steps is None or tokens is None or own is None:
            embedded = self.nothing.expand(prompts, 1, -1)
        else:
            streams = [steps, own[..., self.features.output_dim :]]
            embedded = _linear(self.step, torch.cat(streams, dim=-1))
            embedded = torch.cat([embedded, self.nothing.expand(prompts, 1, -1)], dim=1)
        for number, layer in enumerate(self.layers):
            memory[f"key{number}"], memory[f"value{number}"] = layer.read(embedded)
        if sizes.waypoints:
            memory["waypoint_key"] = _linear(self.waypoint_key, embedded)
        raw = self._raw_memory_on_device(tokens, there, given)
        return memory | (self._raw_memory(tokens, there, given, prompts) if raw is None else raw)

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, time: Tensor) -> Condition:
        batch, single = len(state), len(prompts) == 1
        weights = self._weights_for_states(state, prompts, index)
        if weights is not None:
            spread_out = prompts.pooled[:, None].expand(-1, batch // len(prompts), -1).flatten(0, 1)
            part = self._condition_natively(state, prompts, time, weights)
            return Condition(part, prompts.pooled[0] if single else spread_out)
        prompt = prompts.pooled[0] if single else spread(prompts.pooled, index, batch)
        own, here = self._seen(state, time)
        if not self.reads:
            return Condition(own, prompt)
        # Groups [G, M, ·] of states that share a prompt; where they don't lie in groups, each is one by itself.
        grouped = single or index is None
        found = self._condition_on_device(own, here, prompts) if grouped else None
        if found is not None:
            return Condition(found, prompt)
        groups = len(prompts) if grouped else batch
        memory = prompts.memory if grouped else {name: part[index] for name, part in prompts.memory.items()}
        hidden = self._attend(self._streams(own, prompt), groups, memory)
        parts = [own]
        if self.sizes.attention:
            parts.append(self.norm(hidden).flatten(0, 1))
        if self.sizes.waypoints:
            parts.append(self._retrieve(hidden, here.unflatten(0, (groups, -1)), memory).flatten(0, 1))
        return Condition(torch.cat(parts, dim=-1), prompt)

    def inputs(self) -> ContextInputs:
        """What the C++ code's arrays are made by, as it is now."""
        assert self.trajectory_encoder is not None, "it reads demonstrations"
        periods, ahead = self.periods if self.sizes.timestep_embedding else None, self.sizes.lookahead
        frequencies = self.trajectory_encoder.frequencies
        return ContextInputs(self._shape, self.features, frequencies, periods, ahead, _TIME_UNIT)

    @property
    def _row_names(self) -> list[str]:
        """Of the memory, what has a gradient."""
        names = [f"{kind}{number}" for number in range(self._shape.layers) for kind in ("key", "value")]
        return [*names, "waypoint_key"] if self._shape.waypoints else names

    def takes(self, tokens: TrajectoryTokens, states: int) -> bool:
        """Whether the C++ code reads such prompts in training, and so many states in equal groups under them."""
        prompts, steps = tokens.mask.shape
        few = not prompts or steps < layers.FEW_ROWS or states // prompts < layers.FEW_ROWS or states % prompts
        return self._reads_natively(tokens) and not few

    def weights_natively(self) -> tuple[Weights, Weights] | None:
        """What the C++ code reads prompts by, and states; None where it can't."""
        prompts, states = parameters(self, self._prompt_weights), parameters(self, self._state_weights)
        return None if prompts is None or states is None else (prompts, states)

    def _reads_natively(self, tokens: TrajectoryTokens) -> bool:
        """Whether the C++ code reads such prompts in training: one demonstration each, within the encoder's limit."""
        encoder = self.config.encoder
        dropped = self.training and encoder.dropout > 0
        return (
            self.reads
            and not tokens.counts
            and tokens.ends is None
            and not dropped
            and tokens.mask.shape[1] <= encoder.steps
        )

    def _weights_for_prompts(self, text: Tensor | None, tokens: TrajectoryTokens | None) -> Weights | None:
        """What the C++ code reads prompts by, where it does: in training, one demonstration a prompt."""
        if tokens is None or not torch.is_grad_enabled() or not self._reads_natively(tokens):
            return None
        if text is None and self.config.text:
            return None
        given = [tokens.states, tokens.actions, *([] if text is None else [text])]
        few = not len(tokens.mask) or tokens.mask.shape[1] < layers.FEW_ROWS
        if few or not layers.computes(*given) or any(part.requires_grad for part in given):
            return None
        return parameters(self, self._prompt_weights)

    def _weights_for_states(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None) -> Weights | None:
        """What the C++ code reads states by, where it does: in training, states in equal groups."""
        if not self.reads or not torch.is_grad_enabled() or not len(prompts):
            return None
        count, rows = len(state) // len(prompts), len(state) % len(prompts)
        if count < layers.FEW_ROWS or rows:
            return None
        if (index is not None and len(prompts) > 1) or state.requires_grad:
            return None
        if ("there" in prompts.memory) != self._shape.similarity or not layers.computes(state, prompts.pooled):
            return None
        return parameters(self, self._state_weights)

    def _condition_natively(self, state: Tensor, prompts: EncodedPrompts, time: Tensor, weights: Weights) -> Tensor:
        memory = prompts.memory
        inputs = self.inputs()
        states = inputs.new_states(len(state))
        inputs.write_states(state, time, states)
        read = {name: memory[name] for name in ("bias", "waypoint_bias", "there", "waypoints") if name in memory}
        raw = {name: native.array(part) for name, part in read.items()}
        seen = Seen(
            own=states.own,
            here=states.here,
            bias=raw["bias"][:, 0, 0],
            waypoint_bias=raw["waypoint_bias"][:, 0, 0] if self._shape.waypoints else None,
            there=raw.get("there"),
            waypoints=raw["waypoints"][:, 0] if self._shape.waypoints else None,
        )
        rows = [memory[name] for name in self._row_names]
        return read_states(self._shape, seen, [prompts.pooled, *rows], weights, [*read.values()])

    def _condition_on_device(self, own: Tensor, here: Tensor, prompts: EncodedPrompts) -> Tensor | None:
        """The state part of states in equal groups, by a CUDA device's kernels; None where they don't compute it."""
        if not device_reading.may_read(own):
            return None
        weights, memory = device_parameters(self, self._state_weights), prompts.memory
        if weights is None:
            return None
        given = self.given(own, here, prompts)
        memories = [memory[name] for name in self._row_names]
        if not device_reading.reads_states(self._shape, given, [*memories, *weights]):
            return None
        return device_reading.read_states(self._shape, given, memories, weights)

    def given(self, own: Tensor, here: Tensor, prompts: EncodedPrompts) -> device_reading.Given:
        """States [B, ·] and their places [B, ·] under prompts, as a CUDA device's kernels take them."""
        memory, waypoints = prompts.memory, self._shape.waypoints
        return device_reading.Given(
            own=own,
            here=here,
            bias=memory["bias"].flatten(1),
            waypoint_bias=memory["waypoint_bias"].flatten(1) if waypoints else None,
            there=memory.get("there"),
            waypoints=memory["waypoints"].flatten(0, 1) if waypoints else None,
            pooled=prompts.pooled,
        )

    def weights(self, state: Tensor, prompts: EncodedPrompts, time: Tensor) -> Tensor:
        if not self.retrieves:
            return super().weights(state, prompts, time)
        own, here = self._seen(state, time)
        hidden = self._attend(self._streams(own, prompts.pooled[0]), 1, prompts.memory)
        return self._waypoint_weights(hidden, here[None], prompts.memory)[0].transpose(0, 1)

    @torch.no_grad()
    def parts(self, prompts: EncodedPrompts) -> ContextParts:
        sizes, tables = self.sizes, feature_tables(self.features)
        parts = ContextParts(self.features.state_dim, self.action_dim, *tables, prompts.pooled)
        if sizes.timestep_embedding:
            parts = replace(parts, periods=_PERIODS, time_unit=_TIME_UNIT)
        if not self.reads:
            return parts
        weights = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] in _LOOKS}
        if "likeness" in weights:
            weights["likeness"] = weights["likeness"].exp()
        text = prompts.pooled[:, : self.config.text_dim if self.config.text else 0]
        own = self.query.in_features - text.shape[1]
        # The prompt's part of the query, and memory without the dimensions that it is broadcast along.
        memory = {"query_init": F.linear(text, self.query.weight[:, own:], self.query.bias)}
        for name, part in prompts.memory.items():
            broadcast = 2 if name in ("bias", "waypoint_bias") else 1 if name == "waypoints" else 0
            memory[name] = _heads(part, sizes.heads) if name in self._row_names else part.flatten(0, broadcast)
        ahead = len(sizes.lookahead)
        return replace(parts, heads=sizes.heads, lookaheads=ahead, weights=weights, memory=memory)

    def _seen(self, state: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of states [..., S] by themselves, [..., O]; what moments are compared by, [..., C].

        That is features and geometry, with the time beside where it is embedded. Without waypoints nothing is compared.
        """
        timed, compares = self.sizes.timestep_embedding, self.retrieves
        if device_features.reads(self.features, state):
            times = (time, self.periods, _TIME_UNIT) if timed else None
            found, place = device_features.read(self.features, state, compares, times)
            return found, state[..., :0] if place is None else place
        own, here = self.features(state), self.features.geometry(state) if compares else state[..., :0]
        if timed:
            own = torch.cat([own, self._embedded_steps(time)], dim=-1)
            here = torch.cat([here, time[..., None] / _TIME_UNIT], dim=-1) if compares else here
        return own, here

    def _streams(self, own: Tensor, prompt: Tensor) -> Tensor:
        """The same with its text beside: what queries are made of."""
        if not self.config.text:
            return own
        return torch.cat([own, prompt[..., : self.config.text_dim].expand(len(own), -1)], dim=-1)

    def _attend(self, streams: Tensor, groups: int, memory: dict[str, Tensor]) -> Tensor:
        """Queries [G, M, W] of the states, after they have looked at the demonstration."""
        hidden = _linear(self.query, streams).unflatten(0, (groups, -1))
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, memory[f"key{number}"], memory[f"value{number}"], memory["bias"])
        return hidden

    def _embedded_steps(self, steps: Tensor) -> Tensor:
        """Time steps [...] → [..., 2 waves a period]."""
        angle = 2 * math.pi * steps[..., None].to(self.periods.dtype) / self.periods
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def _raw_memory_on_device(
        self, tokens: TrajectoryTokens | None, there: Tensor | None, given: Tensor | None
    ) -> dict[str, Tensor] | None:
        """`_raw_memory` of demonstrations on a CUDA device, by its kernel; None where it does not compute that."""
        if not self.sizes.waypoints or tokens is None or there is None or tokens.ends is not None:
            return None
        if not device_memory.reads(tokens.mask, given, tokens.actions, there):
            return None
        ahead, geometry, similarity = self.sizes.lookahead, self.features.geometry_dim, self.sizes.geometric_similarity
        return device_memory.read(tokens.mask, given, tokens.actions, there, ahead, geometry, similarity)

    def _raw_memory(
        self, tokens: TrajectoryTokens | None, there: Tensor | None, given: Tensor | None, prompts: int
    ) -> dict[str, Tensor]:
        """Which steps there are, [P, 1, 1, T + 1]; places, raw values of the waypoints' retrieval."""
        if tokens is None:
            mask = torch.ones(prompts, 1, dtype=torch.bool, device=self.nothing.device)
        else:
            usable = tokens.mask if given is None else tokens.mask & (given > 0)
            mask = F.pad(usable, (0, 1), value=True)
        memory = {"bias": _bias(mask)}
        if tokens is not None and tokens.ends is not None:
            # As many times as there are demonstrations: what is in all of them is found as it is in one.
            memory["bias"][..., -1] = torch.tensor(tokens.counts, device=mask.device).log()[:, None, None]
        if not self.sizes.waypoints:
            return memory
        known = mask[:, :-1].any(1, keepdim=True)
        # The last step is for prompts without a demonstration alone: heads that may ignore it would end up ignoring it.
        memory["waypoint_bias"] = _bias(torch.cat([mask[:, :-1], ~known], dim=1))
        geometry = None if there is None else there[..., : self.features.geometry_dim]
        memory["waypoints"] = self._waypoints(tokens, geometry, len(mask))
        if self.sizes.geometric_similarity and there is not None:
            memory["there"] = F.pad(there, (0, 0, 0, 1))
        return memory

    def _waypoints(self, tokens: TrajectoryTokens | None, geometry: Tensor | None, prompts: int) -> Tensor:
        """The raw values [P, 1, T + 1, A + L G]: action, geometry at every lookahead; zeros in the last step."""
        width = self.action_dim + self.features.geometry_dim * len(self.sizes.lookahead)
        if tokens is None or geometry is None:
            return self.nothing.new_zeros(prompts, 1, 1, width)
        # Past the demonstration's end its last step stands: it is where the demonstration went.
        last = (tokens.mask.sum(1, keepdim=True) - 1).clamp_min(0) if tokens.ends is None else tokens.ends
        place = torch.arange(tokens.states.shape[1], device=geometry.device)
        parts = [tokens.actions]
        for ahead in self.sizes.lookahead:
            later = torch.minimum(place + ahead, last)[..., None].expand(-1, -1, geometry.shape[-1])
            parts.append(geometry.gather(1, later))
        return F.pad(torch.cat(parts, dim=-1), (0, 0, 0, 1))[:, None]

    def _waypoint_weights(self, hidden: Tensor, here: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """Queries [G, M, W] of states at places [G, M, ·] → weights [G, heads, M, T + 1]."""
        query, key = (
            _heads(part, self.sizes.heads) for part in (_linear(self.waypoint_query, hidden), memory["waypoint_key"])
        )
        score = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + memory["waypoint_bias"]
        if "there" in memory:
            # -sum of w (here - there)^2. As differences: multiplied out, its terms would be far greater than their sum.
            away = (here[:, :, None] - memory["there"][:, None]).square() @ self.likeness.exp().T
            score = score - away.permute(0, 3, 1, 2)
        return score.softmax(-1)

    def _retrieve(self, hidden: Tensor, here: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """What the waypoint heads find, and how far the state is from it: [G, M, heads (A + 2 L G)]."""
        if layers.computes_groups(hidden, here) and not here.requires_grad:  # of which the C++ code has no gradient
            return self._retrieve_natively(hidden, here, memory)
        weight = self._waypoint_weights(hidden, here, memory)
        found = weight @ memory["waypoints"]
        action, there = found.split([self.action_dim, found.shape[-1] - self.action_dim], dim=-1)
        # Weighted like the sum that it is taken from: the step that says nothing is at no distance.
        seen = 1 - weight[..., -1:]
        here = here[..., : self.features.geometry_dim]
        away = there - seen * here.repeat(1, 1, len(self.sizes.lookahead))[:, None]
        parts = torch.cat([action, away, torch.tanh(_NEARNESS * away)], dim=-1)
        return parts.transpose(1, 2).flatten(2)

    def _retrieve_natively(self, hidden: Tensor, here: Tensor, memory: dict[str, Tensor]) -> Tensor:
        compared = (memory["there"], self.likeness.exp()) if "there" in memory else None
        return layers.retrieve(
            _linear(self.waypoint_query, hidden),
            memory["waypoint_key"],
            memory["waypoint_bias"].flatten(1),
            here,
            compared,
            memory["waypoints"].flatten(0, 1),
            heads=self.sizes.heads,
            action_dim=self.action_dim,
            geometry=self.features.geometry_dim,
        )


class AttentionLayer(nn.Module):
    """Attention of queries to a memory, then a feed-forward of twice the width; both normalised first and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.memory_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.forward_norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, T, W] of a memory [P, T, W], heads side by side."""
        if layers.computes(memory):
            key, value = layers.linears(memory, self.memory_norm, (self.key, self.value))
            return key, value
        normed = self.memory_norm(memory)
        return self.key(normed), self.value(normed)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Queries [G, M, W] of G groups, each to its own keys and values; bias [G, 1, 1, T]: -inf for no step."""
        if layers.computes_groups(hidden, key, value):
            return layers.attention_layer(hidden, key, value, bias.flatten(1), self.heads, self._weights())
        query, key, value = (_heads(part, self.heads) for part in (self.query(self.query_norm(hidden)), key, value))
        score = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1]) + bias
        found = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(found)
        return hidden + self.narrow(F.gelu(self.widen(self.forward_norm(hidden))))

    def _weights(self) -> layers.LayerWeights:
        parts = (self.query, self.out, self.widen, self.narrow)
        return layers.LayerWeights(self.query_norm, self.forward_norm, *((part.weight, part.bias) for part in parts))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on x [..., I]; on several threads where the C++ code computes it."""
    if layers.computes(x):
        return layers.linears(x, None, (layer,))[0]
    result: Tensor = layer(x)
    return result


def _bias(mask: Tensor) -> Tensor:
    """0 where the mask [P, T] holds and -inf elsewhere, [P, 1, 1, T]."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill(~mask, -math.inf)[:, None, None]


def _heads(vectors: Tensor, heads: int) -> Tensor:
    """[G, M, W] → [G, heads, M, W / heads]."""
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
