"""What version 0.1 wrote and typed, as this version has it: options, run configurations, policy descriptions.

Version 0.1 had a section for each method beside `policy`, `acting` and `training.augmentation`; now all that a method
has is under `method`, and each method's configuration says which sections were its own (`MethodConfig.legacy`). The old
spellings of options go with the next version; policy folders stay readable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from llmdpd.errors import InputError

_RENAMED = {
    "training.batch_size": "method.batch_size",
    "training.prompts_per_batch": "method.prompts_per_batch",
    "training.augmentation.turn": "method.augmentation.rotate",
    "acting.replan": "method.acting.action_horizon",
    "data.prompts": "data.demonstrations",
    "data.prompt_episodes": "data.demonstration_episodes",
    "data.tail": "data.post_success_steps",
    "evaluation.films": "evaluation.videos",
    "evaluation.film_tasks": "evaluation.video_tasks",
}
_PREFIXES = {
    "training.augmentation.": ("method.augmentation.",),
    "acting.": ("method.acting.",),
    # Of networks that read their demonstration themselves, what was the context's is their own.
    "policy.context.encoder.": ("method.network.context.encoder.", "method.network.demonstration."),
    "policy.context.": ("method.network.context.", "method.network."),
    "policy.": ("method.network.",),
}
GONE = {
    "acting.views": 1,
    "training.augmentation.gripper": 0.0,
    "training.augmentation.example_noise": 0.0,
    "training.augmentation.clock_scale": 0.0,
}
"""What version 0.1 could do besides, and the value at which it did nothing."""

_NONE: Mapping[str, str] = {}


def is_old(field: str, sections: Collection[str]) -> bool:
    """Whether a dotted field can be version 0.1's; `sections`: those of all methods."""
    names = (*_RENAMED, *GONE)
    return field in names or field.startswith(tuple(_PREFIXES)) or field.partition(".")[0] in sections


def renamed_field(
    field: str, sections: Mapping[str, str], known: Collection[str], former: Mapping[str, str] = _NONE
) -> str | None:
    """Version 0.1's dotted name of a field as it is now; None where the method does not have it.

    Args:
        sections: version 0.1's sections that were the method's own, and where they are now, as {"agent": "method."}.
        known: dotted names of the configuration's fields, one of which it is.
        former: dotted names that its fields had since, and those that they have now.
    """
    section, _, rest = field.partition(".")
    found = [_RENAMED.get(field, field)]
    if rest and section in sections:
        found.insert(0, f"{sections[section]}{rest}")
    for old, new in _PREFIXES.items():
        if field.startswith(old):
            found += [f"{prefix}{field.removeprefix(old)}" for prefix in new]
    return next((now for name in found for now in (name, former.get(name)) if now in known), None)


def upgraded(
    plain: Mapping[str, Any],
    sections: Mapping[str, str],
    default: Mapping[str, Any],
    others: Callable[[], Iterable[tuple[Mapping[str, str], Collection[str], Mapping[str, str]]]],
    former: Mapping[str, str] = _NONE,
) -> dict[str, Any]:
    """Version 0.1's plain configuration as this version's: `default` with the values that are still there.

    Every configuration of version 0.1 had the fields of all methods. Those that the method does not have are left out.

    Args:
        sections, former: the method's; see `renamed_field`.
        others: sections, fields and former names of all methods, asked for where a field is not the method's.

    Raises:
        InputError: an unknown field, or a value of what this version can't do any more.
    """
    result = copy.deepcopy(dict(default))
    known = [name for name, _ in leaves(default)]
    for name, value in leaves(plain):
        if name in GONE and value != GONE[name]:
            hint = "load it with version 0.1 of llmdpd"
            raise InputError("this is no longer possible", field=name, found=value, expected=GONE[name], hint=hint)
        now = renamed_field(name, sections, known, former)
        if now is None:
            if name not in GONE and not any(renamed_field(name, *other) for other in others()):
                raise InputError("unknown field in the configuration", field=name, found=value)
        else:
            *parts, last = now.split(".")
            place: Any = result
            for part in parts:
                place = place[part]
            place[last] = value
    return result


def leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the fields of a plain configuration, and their values."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
