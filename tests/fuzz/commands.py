"""The command lines: words as users write them, damaged, up to where the work would begin."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
from judge import Case, Target
from readers import _tasks, _write_run

from llmdpd.__main__ import main
from llmdpd.errors import InputError

Random = np.random.Generator
# Each runs in a folder with the run `run`, the task file `tasks.toml` and a folder without rights `closed`.
_LINES = (
    "train --preset smoke --seed 3 --run-dir new --training.iterations 9 --tasks.seen reach --tasks.unseen door-lock",
    "train --preset metaworld --method dt --method.lr 3e-4 --data.path data --run-dir runs/a --evaluation.no-videos",
    "train --resume run --training.iterations 300 --threads 2",
    "train --tasks-file tasks.toml --run-dir own --evaluation.episodes 3",
    "train --protocol ml45 --method llmdpd --method.network.context.no-text --method.eta 0.05 --device cpu",
    "evaluate run --episodes 3 --seen-episodes 1 --checkpoint last --prompts swapped --out results.json",
    "evaluate --baseline replay --tasks reach push --data-root data --prompt-behaviours clean slow",
    "report run --out page.html",
    "report run run --out sub/page.html",
    "experiment table1 --seeds 2 --budget smoke --out grid --only llmdpd --dry-run -- --training.iterations 20",
    "experiment table2 --protocol d4rl --jobs 2 --dry-run",
    "collect --tasks reach push-v2 --episodes 4 --noise clean,gaussian --out data --max-steps 60 --workers 1 --seed 5",
    "collect --policy sac --tasks Hopper-v5 --steps 2000 --level 30 --out data",
    "tasks check tasks.toml --out picture.png",
    "pretrain --corpus words.txt --out gpt2",
    "export run --task reach --to cpp --demonstration data --demonstrations 2 --samples 1 --steps 5 --out exported",
    "--help",
)
_VALUES = (
    *(
        "",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "99999999999999999999",
        "1" * 5000,
        "None",
        "True",
        "()",
        "x[/b]",
        "run[a]",
    ),
    *("[red]", "a\x00b", "n" * 300, "ä\udcff", ".", "..", "run", "tasks.toml", "tasks.toml/x", "closed/x", "fifo"),
    *(
        "-",
        "--",
        "--help",
        "--seed",
        "--out",
        "=",
        "--run-dir=",
        "--x=[/]",
        "minari:x",
        "d4rl:y",
        "a,b,,c:1",
        "clean:nan",
    ),
    *("{", "%s", "\n", "\x1b[31m", "~nobody/x", "no/such", "hopper-v5", "reach"),
)


class _WorkBeginsError(BaseException):
    """The command line was taken."""


def _begins(*_: Any, **__: Any) -> NoReturn:
    raise _WorkBeginsError


# Where the commands' work begins.
_WORK = (
    "llmdpd.cli.train.execute",
    "llmdpd.data.collecting.scripted.map_unordered",
    "llmdpd.data.collecting.medium_replay._collect_task",
    "llmdpd.methods.lamo.pretraining.tokenize",
    "llmdpd.tasks.simulation.rollout.EnvPool.__enter__",
    "llmdpd.runs.evaluate.load_policies",
    "llmdpd.runs.export.load_policies",
)


def _prepare(folder: Path) -> Case:
    (folder / "run").mkdir()
    _write_run(folder / "run")
    _tasks(folder)
    (folder / "words.txt").write_text("words to learn from\n" * 50)
    os.mkfifo(folder / "fifo")
    (folder / "closed").mkdir(0)
    for place in _WORK:
        mock.patch(place, _begins).start()
    kept = {path for path in folder.rglob("*")}

    def case(rng: Random) -> None:
        words = damaged(shlex.split(_LINES[rng.integers(len(_LINES))]), rng)
        os.chdir(folder)
        try:
            with contextlib.suppress(_WorkBeginsError):
                code = _exit_code(words)
                assert code in (0, 1, 2), f"exit code {code}"
                if code == 2:
                    raise InputError("refused by the command")
        finally:
            _remove_new(folder, kept)

    return case


def _exit_code(words: list[str]) -> object:
    try:
        return main(words)
    except SystemExit as stop:  # --help
        return stop.code or 0


def _remove_new(folder: Path, kept: set[Path]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in kept:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def damaged(words: list[str], rng: Random) -> list[str]:
    """The words with one to three of them exchanged, left out, doubled, moved or changed inside."""
    for _ in range(int(rng.integers(1, 4))):
        action: Callable[[list[str], int, Random], list[str]] = _ACTIONS[rng.integers(len(_ACTIONS))]
        words = action(words, int(rng.integers(1, len(words))) if len(words) > 1 else 0, rng)
    # An experiment without it would run; no path leaves the folder.
    words = [word for word in words if word != "--no-dry-run"]
    words = [f".{word}" if word.startswith("/") else word for word in words]
    return [*words[:1], "--dry-run", *words[1:]] if words[:1] == ["experiment"] and "--dry-run" not in words else words


def _exchange(words: list[str], at: int, rng: Random) -> list[str]:
    return [*words[:at], _VALUES[rng.integers(len(_VALUES))], *words[at + 1 :]]


def _leave_out(words: list[str], at: int, rng: Random) -> list[str]:
    return words[:at] + words[at + 1 :]


def _put_in(words: list[str], at: int, rng: Random) -> list[str]:
    return [*words[:at], _VALUES[rng.integers(len(_VALUES))], *words[at:]]


def _move(words: list[str], at: int, rng: Random) -> list[str]:
    to = int(rng.integers(len(words))) if words else 0
    return [*words[:to], *words[at : at + 1], *words[to:]]


def _change(words: list[str], at: int, rng: Random) -> list[str]:
    if at >= len(words):
        return words
    word, place = words[at], int(rng.integers(len(words[at]) + 1))
    new = word[:place] + chr(int(rng.choice([rng.integers(33, 127), rng.integers(160, 0xD800)]))) + word[place + 1 :]
    return [*words[:at], new, *words[at + 1 :]]


_ACTIONS = (_exchange, _leave_out, _put_in, _move, _change)
COMMANDS = {"command lines": Target(_prepare, (InputError,))}
