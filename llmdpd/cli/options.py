"""Options of llmdpd.train as words of a command line: the field that each of them sets, and which a method has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.methods.networks import ONLINE, Method
from llmdpd.utils.plain import to_plain

_CHAIN = ("policy.time_dim", "policy.diffusion_steps", "policy.schedule", "acting.sampler", "acting.steps")
_CONTEXT = ("policy.context", "training.augmentation")
_POLICY_DIFFUSION = (
    "agent",
    *_CONTEXT,
    *_CHAIN,
    "policy.hidden_dim",
    "policy.chunk",
    "acting.samples",
    "acting.selection",
    "acting.temperature",
    "acting.noise_scale",
    "acting.precision",
    "acting.replan",
    "acting.views",
)
_PLAN = tuple(f"policy.plan.{name}" for name in ("horizon", "layers", "heads", "width", "inner", "dropout"))
# All but clock_scale, for those that read no time step of their example.
_AUGMENTATION = tuple(
    f"training.augmentation.{name}"
    for name in ("offset", "offset_probability", "turn", "mirror", "gripper", "example_noise")
)
_READS_EXAMPLE = (
    "policy.context.features",
    "policy.context.trajectory_dropout",
    "policy.context.encoder.steps",
    "policy.context.encoder.sampling",
)
_DATA_SET = (
    *(f"data.{name}" for name in ("path", "prompts", "episodes", "prompt_episodes", "noise", "tail", "seed")),
    *("data.keep_failed", "data.fraction", "data.sac_steps", "training.prompts_per_batch", "training.cuda_graph"),
)
"""Read by the methods that learn from a data set: what it is, and what its batches are like."""

_OWN_FIELDS: dict[Method, tuple[str, ...]] = {
    "llmdpd": _POLICY_DIFFUSION,
    "trajectory-diffusion": ("planner", *_CONTEXT, *_CHAIN, *_PLAN, "acting.samples", "acting.noise_scale"),
    "diffusion-ql": _POLICY_DIFFUSION,
    "diffusion-bc": _POLICY_DIFFUSION,
    "bc": ("bc", *_CONTEXT, "policy.hidden_dim", "acting.noise_scale"),
    "td3-bc": ("td3_bc", *_CONTEXT, "policy.hidden_dim"),
    "rad": ("td3_bc", *_CONTEXT, "rad", "policy.hidden_dim"),
    "s4rl": ("td3_bc", *_CONTEXT, "s4rl", "policy.hidden_dim"),
    "cql": ("cql", *_CONTEXT, "policy.hidden_dim", "acting.noise_scale"),
    "dt": ("dt", "policy.sequence", "policy.context.features"),
    "prompt-dt": (
        "dt",
        "policy.sequence",
        *_READS_EXAMPLE,
        "training.augmentation",
    ),
    "mtdiff": ("mtdiff", *_READS_EXAMPLE, *_AUGMENTATION, *_CHAIN, "policy.plan", "acting.noise_scale"),
    "lamo": (
        "lamo",
        "policy.lora",
        "policy.sequence.context",
        "policy.sequence.dropout",
        "policy.sequence.longest",
        "policy.context.features",
    ),
    "sac": ("sac", "policy.hidden_dim", "acting.noise_scale"),
}
METHOD_FIELDS: dict[Method, tuple[str, ...]] = {
    method: own if method in ONLINE else (*own, *_DATA_SET) for method, own in _OWN_FIELDS.items()
}
"""The fields, and parts of the configuration, that not every method reads, under each method that does."""

METHOD_SECTIONS = {part for parts in METHOD_FIELDS.values() for part in parts if "." not in part} - {"agent"}
"""Parts of the configuration that one method has, or a few of a kind: `lamo`, `td3_bc`, `planner`. Not `agent`, policy
diffusion's, whose ablations the tables compare."""

READ_FROM_FILES = ("policy.language",)
"""Fields that no option sets: the sizes of a language model are what its files say."""

ALIASES = {"agent": "method", "data": "data.path", "cuda_graph": "training.cuda_graph"}
"""Fields by the second names that their options have, see `TrainConfig`."""


class Option(NamedTuple):
    """An option as it was given: its name ("--agent.critic-lr"), its field ("agent.critic_lr"), all of its words."""

    name: str
    field: str
    words: tuple[str, ...]


def split_options(words: Sequence[str]) -> list[Option]:
    """The options of a command line with their values; words before the first one are an option without a name."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return [_option(group) for group in groups]


def _option(words: Sequence[str]) -> Option:
    name = words[0].split("=", 1)[0] if words[0].startswith("--") else ""
    *parts, last = name.removeprefix("--").replace("-", "_").split(".")
    # A switch is turned off by --part.no-field; no field's own name begins so.
    field = ".".join((*parts, last.removeprefix("no_")))
    return Option(name, ALIASES.get(field, field), tuple(words))


def has_field(method: Method, field: str) -> bool:
    """Whether the method reads the field; names that are no field's are left to who parses them."""
    if _within(field, READ_FROM_FILES):
        return False
    own = METHOD_FIELDS[method]
    others = [part for parts in METHOD_FIELDS.values() for part in parts]
    return _within(field, own) or not _within(field, others)


def check_method_options(words: Sequence[str], method: Method) -> None:
    """Refuse options that were given and that the method has no use for; what a preset or a default says is no matter.

    Raises:
        InputError: naming the first of them, the method, and the options that the method has in place of it.
    """
    for option in split_options(words):
        if has_field(method, option.field):
            continue
        own = [
            _option_name(field) for field in _leaves(to_plain(TrainConfig())) if _within(field, METHOD_FIELDS[method])
        ]
        last = option.field.rpartition(".")[2].replace("_", "-")
        alike = [name for name in own if name.endswith(f".{last}")]
        raise InputError(
            "the method has no such option",
            field=option.name,
            found=f"{' '.join(option.words)}, with --method {method}",
            expected=f"{', '.join(own)}, or options that all methods have (--help)",
            hint=f"leave it out, or use {' or '.join(alike)}" if alike else "leave it out, or choose another --method",
        )


def _within(field: str, parts: Sequence[str]) -> bool:
    return any(field == part or field.startswith(f"{part}.") for part in parts)


def _option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a plain configuration."""
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
