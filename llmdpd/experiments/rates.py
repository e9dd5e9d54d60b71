"""How long cells will take, from runs that are there or from a short measurement of this machine."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmdpd.config.schema import EvaluationConfig, TrainConfig
from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes, save_minari
from llmdpd.errors import InputError
from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.methods.networks import ONLINE
from llmdpd.policy.policy import Policy
from llmdpd.prompts import task_prompt
from llmdpd.tasks.specs import common_spec
from llmdpd.training.metrics import read_metrics
from llmdpd.utils.files import read_json

_LOG_EVERY, _MARKS = 10, 3
_STEPS = 100  # of an environment, timed
_ROWS = 16  # of a batch of actions: of 32 episodes that an evaluation runs at once, half act at a time
_EXAMPLE_STEPS = 200
MEASURED_NOW = (
    f"measured now: {_LOG_EVERY * (_MARKS - 1)} iterations on random data (sac: in an environment) and {_STEPS} steps "
    "of an environment, every evaluated episode counted to its limit"
)


@dataclass(frozen=True)
class Rate:
    """Seconds an iteration of training and an episode of evaluation, and where they are from, in words."""

    iteration: float
    episode: float
    source: str


def known_rates(cells: Iterable[Cell]) -> dict[str, Rate]:
    """Rates of the finished cells by method and, for methods without one, by preset."""
    rates: dict[str, Rate] = {}
    for cell in cells:
        rate = _rate_of(cell)
        if rate is not None:
            rates[cell.method] = rate
            rates.setdefault(_kind(cell), rate)
    return rates


def _kind(cell: Cell) -> str:
    return f"preset {cell.preset}, method {cell.config.method}"


def _rate_of(cell: Cell) -> Rate | None:
    if not cell.run.meta.is_file():
        return None
    times = read_json(cell.run.meta).get("times", {})
    records = cell.records()
    # Two checkpoints of the same iteration are evaluated once.
    episodes = sum({(r.task, r.iterations): r.episodes for r in records}.values())
    if not episodes or not {"training_seconds", "evaluation_seconds"} <= times.keys():
        return None
    iteration = times["training_seconds"] / cell.config.training.iterations
    return Rate(iteration, times["evaluation_seconds"] / episodes, cell.name)


def seconds_left(cell: Cell, rate: Rate) -> float:
    """What the cell still takes at this rate; collecting data comes on top."""
    config = cell.config
    asked = EvaluationConfig(cell.episodes, cell.seen_episodes)
    seen = len(config.tasks.seen) * asked.episodes_of("seen")
    unseen = len(config.tasks.unseen) * asked.episodes_of("unseen")
    iterations = 0 if cell.records() else config.training.iterations - cell.iterations_done
    checkpoints = 2 if config.training.select_every else 1
    episodes = 0 if cell.evaluated(cell.run.results) else checkpoints * (seen + unseen)
    # Further evaluations are of the last checkpoint, on the tasks that are held out where there are any.
    further = sum(not cell.evaluated(evaluation.file(cell.folder)) for evaluation in cell.evaluations)
    episodes += further * (unseen or seen)
    return iterations * rate.iteration + episodes * rate.episode


def calibrate(cell: Cell, share: Share) -> Rate:
    """Train the cell's configuration for 30 iterations on random data, and act in one of its environments.

    A method that learns in the environments does so, without its warm-up.

    Raises:
        InputError: the training failed.
    """
    config = cell.config
    tasks = config.tasks.seen[: config.training.prompts_per_batch]
    with tempfile.TemporaryDirectory(prefix="llmdpd-calibration-") as name:
        folder = Path(name)
        data = _random_data(tasks)
        save_minari(data, folder / "data")
        step = Step("calibrate", _words(cell, folder, tasks, share))
        done = subprocess.run(step.argv, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                "the short training that measures this machine failed", field=cell.method, found=done.stderr[-1000:]
            )
        marks = [
            r["wall_seconds"]
            for r in read_metrics(folder / "run" / "metrics.jsonl")
            if any(n.startswith("loss/") for n in r)
        ]
        # The first mark's iterations warm up.
        iteration = (marks[-1] - marks[0]) / (_LOG_EVERY * (len(marks) - 1))
        step_seconds = _seconds_a_step(Policy.load(folder / "run" / "policy"), data, config)
    episode = step_seconds * config.evaluation.max_steps / share.threads
    return Rate(iteration, episode, "measured now")


def _words(cell: Cell, folder: Path, tasks: tuple[str, ...], share: Share) -> tuple[str, ...]:
    options = {
        **_lesson(cell.config, folder / "data"),
        "training.iterations": _LOG_EVERY * _MARKS,
        "training.log-every": _LOG_EVERY,
        "training.select-every": 0,
        "evaluation.episodes": 1,
        "evaluation.max-steps": 1,
        "threads": share.threads,
        "data.workers": 1,
    }
    words = ["llmdpd.train", "--run-dir", str(folder / "run"), "--preset", cell.preset, *cell.options]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return (*words, "--evaluation.no-films", "--tasks.unseen", "--tasks.seen", *tasks)


def _lesson(config: TrainConfig, data: Path) -> dict[str, object]:
    """Options for what is learned from: the random data, or right from the first step."""
    if config.method in ONLINE:
        return {"sac.learning-starts": 0}
    return {"data.path": data, "data.prompts": data}


def _random_data(tasks: tuple[str, ...]) -> TrajectoryDataset:
    draw = np.random.default_rng(0)
    spec = common_spec(tasks)
    records = [
        EpisodeRecord(
            observations=draw.normal(size=(_EXAMPLE_STEPS + 1, spec.state_dim)),
            actions=draw.uniform(-1, 1, (_EXAMPLE_STEPS, spec.action_dim)),
            rewards=draw.uniform(0, 1, _EXAMPLE_STEPS),
            task=task,
            expert_actions=draw.uniform(-1, 1, (_EXAMPLE_STEPS, spec.action_dim)),
            noise_level=0.0,
            success=1 if spec.has_success else -1,
            seed=number,
        )
        for task in tasks
        for number in range(2)
    ]
    return join_episodes(records, goal_visible=None, source="random, for a calibration")


def _seconds_a_step(policy: Policy, data: TrajectoryDataset, config: TrainConfig) -> float:
    """Seconds of an action, one of a batch as an evaluation's, and of an environment's step."""
    from llmdpd.tasks.specs import make_environment

    context = config.policy.context
    text = task_prompt(data.tasks[0]).render() if context.text else None
    example = data.episode(0) if context.trajectory else None
    policy.prompt(text, example)
    # Rows of an evaluation are under several prompts, which costs more than one for all.
    prompts, index = policy.encode_prompts([text] * 2, [example] * 2), np.arange(_ROWS) % 2
    steps = seeds = np.arange(_ROWS)  # any will do
    looks_back = policy.memory() is not None
    env = make_environment(data.tasks[0], config.tasks.goal_visible, render=False)
    observation, acting = env.reset(0), 0.0
    start = time.perf_counter()
    for _ in range(_STEPS):
        begin = time.perf_counter()
        states = np.tile(np.asarray(observation, np.float32), (_ROWS, 1))
        actions = policy.act(states) if looks_back else policy.act_many(states, prompts, index, steps, seeds)
        acting += time.perf_counter() - begin
        observation, _, _, over = env.step(actions[0])
        observation = env.reset(0) if over else observation  # a fall
    stepping = time.perf_counter() - start - acting
    return (acting / _ROWS + stepping) / _STEPS


def rate_for(cell: Cell, rates: dict[str, Rate]) -> Rate | None:
    """The method's own rate, or that of another method of its preset, with the words to tell."""
    own = rates.get(cell.method)
    other = rates.get(_kind(cell))
    return own or (other and dataclasses.replace(other, source=f"{other.source}, of the same preset"))
