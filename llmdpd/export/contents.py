"""What of a policy acts under one prompt, as plain arrays: its weights, and the prompt folded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError, located
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import EncodedPrompts
from llmdpd.ops import native
from llmdpd.ops.packing import ContextParts
from llmdpd.policy.episodes import check_finite
from llmdpd.policy.inputs import Demonstrations
from llmdpd.policy.policy import Policy
from llmdpd.policy.tracker import Scene, Track
from llmdpd.tasks.texts.text_prompt import TextPrompt

Arrays = dict[str, NDArray[Any]]
_OF_MEMORY = ("memory_norm", "key", "value")
"""Parts of an attention layer that read the demonstration, which a prompt has been through."""


class Prompt(NamedTuple):
    """A text, a demonstration or several, or both; see `Policy.prompt`."""

    text: str | TextPrompt | None = None
    trajectory: Demonstrations | None = None


def exportable(policy: Policy) -> tuple[DiffusionPolicy, BestOfN]:
    """The network of a policy that can be exported, and how it acts.

    Raises:
        InputError: a policy of another kind, on another device or in another dtype, or with numbers that are not
            finite; a choice without critics; acting in bfloat16.
    """
    network, acting = policy.network, policy.acting
    if not isinstance(network, DiffusionPolicy) or not isinstance(acting, BestOfN):
        raise InputError(
            "policies of this method cannot be exported",
            field="method",
            found=policy.method,
            expected="llmdpd, diffusion-bc or diffusion-ql: one that diffuses single actions or chunks",
        )
    if acting.samples > 1 and policy.critic is None:
        raise InputError(
            "no critic to choose among samples by", field="samples", found=acting.samples, expected="1 (--samples 1)"
        )
    if acting.precision != "fp32":
        raise InputError("exported policies act in float32", field="precision", found=acting.precision, expected="fp32")
    for field, part in (("network", network), ("critic", policy.critic)):
        for tensor in () if part is None else part.state_dict().values():
            if tensor.dtype is not torch.float32 or not tensor.is_cpu:
                found = f"{tensor.dtype} on {tensor.device}"
                raise InputError("exported policies are float32", field=field, found=found, expected="float32 on cpu")
        with located(field=field):
            check_finite(part)
    return network, acting


def encoded(policy: Policy, prompt: Prompt) -> EncodedPrompts:
    """The prompt read by the policy.

    Raises:
        InputError: as `Policy.prompt`.
    """
    reads = policy.network.reads
    if prompt.text is None and prompt.trajectory is None and (reads.text or reads.trajectory):
        raise InputError("an empty prompt", field="prompt", found="nothing", expected="a text, a demonstration or both")
    return policy.encode_prompts([prompt.text], [prompt.trajectory])


def context_parts(network: DiffusionPolicy, prompts: EncodedPrompts) -> ContextParts:
    """The context with its prompt.

    Raises:
        InputError: a context that nothing but torch can compute.
    """
    parts = network.context.parts(prompts)
    if parts is None:
        kind = type(network.context).__name__
        raise InputError("this context cannot be exported", field="context", found=kind, expected="pooled or retrieval")
    return parts


def policy_arrays(policy: Policy, prompts: EncodedPrompts) -> Arrays:
    """All that acts but the prompt; `prompts` is any of the policy's.

    Raises:
        InputError: as `exportable`.
    """
    network, acting = exportable(policy)
    parts, coefficients = context_parts(network, prompts), acting.coefficients(network.config)
    spaces, chunk = network.spaces, network.config.chunk
    chooses = policy.critic is not None and acting.samples > 1
    sizes = (
        *(spaces.observed_dim, spaces.action_dim, chunk, acting.horizon(network.config), parts.heads, parts.lookaheads),
        *(parts.action_dim, acting.samples if chooses else 1, int(acting.selection == "soft")),
    )
    scalars = (coefficients.start, coefficients.bound, parts.time_unit, acting.temperature)
    arrays: Arrays = {
        "sizes": np.array(sizes, np.int32),
        "scalars": np.array(scalars, np.float32),
        "remembered": np.array(spaces.remembered, np.int32),
        "points.columns": np.array([column for point in parts.points for column in point], np.int32),
        "points.ends": np.cumsum([len(point) for point in parts.points], dtype=np.int32),
        "periods": np.array(parts.periods, np.float32),
    }
    for name, (kinds, numbers) in (("own", parts.own), ("geometry", parts.geometry)):
        arrays |= {f"{name}.kinds": kinds, f"{name}.numbers": numbers}
    if not network.action_scaling.identity:
        arrays["scale"] = network.action_scaling.parts()
    arrays |= {name: native.array(tensor) for name, tensor in parts.weights.items() if not _reads_memory(name)}
    with torch.no_grad():
        embedding = network.net.time_embedding(torch.tensor(coefficients.timesteps))
    arrays |= {**_layers("net", network.net.layers), "net.time": native.array(embedding)}
    arrays["net.table"] = coefficients.table()
    if policy.scene is not None:
        arrays |= _scene_arrays(policy.scene, acting.takes_over)
    if chooses:
        assert policy.critic is not None
        for name in ("q1", "q2"):
            arrays |= _layers(name, getattr(policy.critic, name))
    return arrays


def prompt_arrays(policy: Policy, prompt: Prompt, prompts: EncodedPrompts) -> Arrays:
    """The folded prompt, of which `prompts` is what the policy has read, and its tracks if it hands over to them.

    Raises:
        InputError: as `exportable` and `Policy.prompt`.
    """
    parts = context_parts(exportable(policy)[0], prompts)
    tensors: Mapping[str, Tensor] = {"pooled": parts.pooled, **parts.memory}
    arrays = {name: native.array(tensor, name) for name, tensor in tensors.items()}
    if policy.scene is None or prompt.trajectory is None:
        return arrays
    return arrays | _track_arrays(policy.tracks(prompt.trajectory, policy.scene))


def _scene_arrays(scene: Scene, after: float) -> Arrays:
    """What the tracker reads of observations and writes into actions, and when it takes over at the latest."""
    indices = {"gripper": scene.gripper, "move": scene.move, "grip": scene.grip}
    return {
        "scene.points": np.array([scene.body, scene.object, scene.goal], np.int32),
        **{f"scene.{name}": np.array(numbers, np.int32) for name, numbers in indices.items()},
        "scene.bounds": np.stack([scene.low, scene.high]),
        "scene.numbers": np.array([scene.metres, after]),
    }


def _track_arrays(tracks: Sequence[Track]) -> Arrays:
    """N tracks, one after the other: the steps [N] at which they end, and what they hold."""
    each_step = ("body", "actions", "to_goal", "object", "held", "open")
    return {
        "track.ends": np.cumsum([len(track) for track in tracks], dtype=np.int32),
        **{f"track.{name}": np.concatenate([getattr(track, name) for track in tracks]) for name in each_step},
        "track.goal": np.stack([track.goal for track in tracks]),
        "track.gain": np.array([track.gain for track in tracks], np.float32),
    }


def _reads_memory(name: str) -> bool:
    return name.startswith("layers.") and name.split(".")[2] in _OF_MEMORY


def _layers(name: str, module: nn.Module) -> Arrays:
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return {
        f"{name}.{number}.{part}": native.array(tensor)
        for number, layer in enumerate(linear)
        for part, tensor in (("weight", layer.weight), ("bias", layer.bias))
    }
