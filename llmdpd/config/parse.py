"""From the words of a command line to the configuration of a new run."""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llmdpd.config.own_tasks import TASK_PRESETS, task_preset, tasks_of_file, without_turning
from llmdpd.config.presets import ABLATED, PRESETS, find_preset, with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.config.start import starting_from
from llmdpd.data.task_file import use_task_file
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.user import use_no_file
from llmdpd.utils.command_line import option_lines, parse, suppressed, take_option
from llmdpd.utils.legacy import GONE, is_old, leaves, renamed_field
from llmdpd.utils.plain import former_names, to_plain
from llmdpd.utils.progress import error_console

PROG = "llmdpd train"
ALIASES = {
    "--data": "data.path",
    "--iterations": "training.iterations",
    "--tasks": "tasks.seen",
    "--tasks-file": "tasks.file",
    "--lr": "method.lr",
    "--evaluation": "evaluation.mode",
    "--init": "init.source",
    "--batch-size": "method.batch_size",
    "--logger": "training.logger",
    "--cuda-graph": "training.cuda_graph",
}
"""Short spellings of options that are typed often, and the fields that they set."""


def _listed(words: Iterable[str]) -> str:
    """Words as a list that fits below the help's options."""
    return textwrap.fill(", ".join(words), 88, break_on_hyphens=False).replace("\n", "\n" + 21 * " ")


def _as_ranges(names: Iterable[str]) -> list[str]:
    """Names in their order, those that count on from 0 as the first and the last of them: fold-0 … fold-9."""
    shown: list[str] = []
    following = ""
    for name in names:
        stem, _, number = name.rpartition("-")
        if name == following:
            shown[-1] = f"{stem}-0 … {name}"
        else:
            shown.append(name)
        counts_on = number.isdigit() and (number == "0" or name == following)
        following = f"{stem}-{int(number) + 1}" if counts_on else ""
    return shown


def description() -> str:
    """What the help begins with. Made when it is requested, since protocols are the suites', of other packages too."""
    short = (f"{short} (--{field.replace('_', '-')})" for short, field in ALIASES.items())
    first, *protocols = _as_ranges(PROTOCOLS)
    return f"""Train a policy that is prompted with a text and a demonstration; evaluate it; write a report.

    --preset NAME    start from a named configuration (default: metaworld, or tasks with --tasks-file):
                     {_listed([*(name for name in PRESETS if name not in ABLATED), "ablations as metaworld-no-text"])}
    --protocol NAME  {_listed([f"seen and unseen tasks: {first}", *protocols])}
    --method NAME    the method that learns (default: the preset's):
                     {_listed(METHODS)}
    --run-dir DIR    the run's folder (default: runs/PRESET-seedN-TIME); must be new
    --seeds 0-7      train these seeds in one process; DIR then holds a run folder each, and one report
    --init POLICY    start from a trained policy: a run, a folder or hub:OWNER/NAME (--help-all: --init.…)
    --resume RUN     go on with an interrupted run, as if it had never stopped; --iterations N moves its end
    --push OWNER/NAME   to the Hugging Face hub in the end, or ./FOLDER (licence: --push-license mit)
    short spellings: {_listed(["--gpu (--device cuda)", *short])}

Of another method: --method NAME --help. All, described: --help-all. A switch's off: --evaluation.no-videos."""


_SELDOM = (
    *("init", "data.sac_steps", "training.logger", "evaluation.video_tasks"),
    "method.augmentation.offset_probability",
)
"""Options that --help-all alone shows."""
_OF_DATA_SETS = (
    *("training.cuda_graph", "data.path", "data.demonstrations", "data.episodes", "data.demonstration_episodes"),
    *("data.noise", "data.post_success_steps", "data.seed", "data.keep_failed", "data.fraction", "data.sac_steps"),
)
"""Fields that a method which learns online, from no data set, has no use for."""


class Option(NamedTuple):
    """An option as it was given: its name ("--method.critic-lr"), its field ("method.critic_lr"), all of its words."""

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
    if name.replace("_", "-") in ALIASES:
        return Option(name, ALIASES[name.replace("_", "-")], tuple(words))
    *parts, last = name.removeprefix("--").replace("-", "_").split(".")
    # A switch is turned off by --part.no-field; no field's own name begins so.
    return Option(name, ".".join((*parts, last.removeprefix("no_"))), tuple(words))


def parse_train(words: Sequence[str]) -> TrainConfig:
    """The configuration of a new run: --preset, --protocol, --method and any field, as `llmdpd train` takes them.

    Raises:
        InputError: an unknown preset, protocol or method, an option that does not exist or that the method does not
            have, or what `TrainConfig.resolved` refuses.
    """
    file, rest = _take_task_file(words)
    preset, rest = take_option(rest, "--preset")
    protocol, rest = take_option(rest, "--protocol")
    method, rest = take_option(rest, "--method")
    old, rest = take_option(rest, "--agent")
    init, rest = _take_either(rest, "--init", "--init.source", "two policies to start from")
    if old is not None:
        error_console.print("--agent is now --method; the old spelling goes in the next version")
        if method not in (None, old):
            raise InputError("two methods", field="--method", found=f"{method}, and --agent {old}", expected="one")
    use_no_file()
    suite = None if file is None else use_task_file(file)
    start = find_preset(preset or "metaworld") if suite is None else task_preset(suite, preset)
    if protocol is not None:
        if file is not None:
            hint = "or name them: --tasks.seen A B --tasks.unseen C"
            expected = f'split = "seen" or "unseen" in {file}'
            raise InputError("two splits", field="--protocol", found=protocol, expected=expected, hint=hint)
        if protocol not in PROTOCOLS:
            raise InputError("unknown protocol", field="--protocol", found=protocol, expected=", ".join(PROTOCOLS))
        tasks = dataclasses.replace(PROTOCOLS[protocol], goal_visible=start.tasks.goal_visible)
        start = dataclasses.replace(start, tasks=tasks)
    elif suite is not None:
        start = dataclasses.replace(start, tasks=tasks_of_file(suite))
    elif start.preset in TASK_PRESETS:
        expected = "--tasks-file tasks.toml"
        raise InputError("this preset is for tasks of your own", field="--preset", found=preset, expected=expected)
    chosen = method or old
    start = start if chosen is None else with_method(start, chosen)
    start = start if init is None else starting_from(start, init, chosen)
    return change(start if suite is None else without_turning(start, suite), rest)


def _take_task_file(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The task file that a command line names, and the other words."""
    return _take_either(words, "--tasks-file", "--tasks.file", "two task files")


def _take_either(words: Sequence[str], name: str, field: str, problem: str) -> tuple[str | None, list[str]]:
    """The value of an option in its short or its long spelling, and the other words; both of them are a `problem`."""
    short, rest = take_option(words, name)
    long, rest = take_option(rest, field)
    if None not in (short, long):
        raise InputError(problem, field=name, found=f"{short}, and {long}", expected="one")
    return long if short is None else short, rest


def change(start: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """The configuration with fields changed by a command line's options, checked.

    Raises:
        InputError: an option that does not exist or that the method does not have; and as `TrainConfig.resolved`.
    """
    if "--help" in words or "-h" in words:
        print("\n".join([f"usage: {PROG} [OPTIONS]", "", description(), "", *_help(start)]))
        raise SystemExit(0)
    current = [word for option in split_options(words) for word in _current(option, start)]
    config = _parse_fields(tuple(current), start)
    return dataclasses.replace(config, preset=start.preset).resolved()


def has_field(config: TrainConfig, field: str) -> bool:
    """Whether the configuration has an option for this field, or for fields within it."""
    return any(_within(name, field) for name in field_names(config))


def field_names(config: TrainConfig) -> list[str]:
    """Dotted names of the fields that options set."""
    hidden = _hidden(config)
    return [name for name, _ in leaves(to_plain(config)) if not any(_within(name, part) for part in hidden)]


def _hidden(config: TrainConfig) -> tuple[str, ...]:
    """Fields, or parts, that no option sets: they follow from others, or the method has no use for them."""
    online = METHODS[config.method.name].online
    return ("method.name", *suppressed(config), *(_OF_DATA_SETS if online else ()))


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _current(option: Option, start: TrainConfig) -> tuple[str, ...]:
    """The words of an option in this version's spelling, short ones written out."""
    if option.name == "--gpu":
        return ("--device", "cuda", *option.words[1:])
    if not option.name or option.name == "--help-all":
        return ("--help", *option.words[1:]) if option.name else option.words
    field = current_field(option, start)
    if field is None:
        _check_no_others(option, start)
        return option.words  # the parser says which options are near
    spelling = _spelling(field, option)
    if field != option.field:
        message = f"{option.name} is now {spelling}; the old spelling goes in the next version"
        error_console.print(message, soft_wrap=True)
    _, sign, value = option.words[0].partition("=")
    return (f"{spelling}{sign}{value}", *option.words[1:])


def _check_no_others(option: Option, start: TrainConfig) -> None:
    """Raise `InputError` for an option of other methods than the configuration's, or of the last version alone."""
    if option.field in GONE:
        hint = "version 0.1 was the last that had it"
        raise InputError("this option is gone", field=option.name, found=" ".join(option.words), hint=hint)
    others = [
        name
        for name in METHODS
        if current_field(option, with_method(PRESETS.get(start.preset, PRESETS["metaworld"]), name))
    ]
    if others:
        method = start.method.name
        raise InputError(
            "the method has no such option",
            field=option.name,
            found=f"{' '.join(option.words)}, with --method {method}",
            expected=f"an option of {method}; this is one of {', '.join(others)}",
            hint=f"{PROG} --method {method} --help lists its options",
        )


def current_field(option: Option, start: TrainConfig) -> str | None:
    """The field that an option sets, by its name in this version; None where the configuration has none such."""
    if has_field(start, option.field):
        return option.field
    former = former_names(start)
    if option.field in former:
        return former[option.field]
    sections = {section for name in METHODS for section in METHODS[name].Config.legacy}
    if not is_old(option.field, sections):
        return None
    return renamed_field(option.field, start.method.legacy, field_names(start), former)


def _spelling(field: str, option: Option) -> str:
    """A field as an option, turned off where the option was."""
    *parts, last = field.replace("_", "-").split(".")
    off = option.name.rpartition(".")[2].removeprefix("--").replace("_", "-").startswith("no-")
    return "--" + ".".join((*parts, f"no-{last}" if off and not last.startswith("no-") else last))


# tyro reads the sources of all the configuration's parts at every call; an experiment asks for the same ones again.
@functools.lru_cache(maxsize=1024)
def _parse_fields(words: tuple[str, ...], default: TrainConfig) -> TrainConfig:
    return parse(
        TrainConfig,
        words,
        PROG,
        default,
        description(),
        known=(*ALIASES, "--preset", "--protocol", "--method", "--seeds", "--push", "--push-license"),
    )


def _help(config: TrainConfig) -> list[str]:
    lines = option_lines(config, hidden=(*_hidden(config), *_SELDOM))
    return [f"options of {config.method.name}, with their defaults:", *lines]
