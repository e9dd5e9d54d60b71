"""A run folder as training writes it, with made-up figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.evaluation.results import TaskResult, write_results
from llmdpd.evaluation.videos import save_video

SEEN = ("sweep-into-v3", "coffee-push-v3", "disassemble-v3")
UNSEEN = ("box-close-v3", "hand-insert-v3", "bin-picking-v3")
SUCCESSES = {
    "last": dict(zip(SEEN + UNSEEN, (24, 19, 22, 9, 6, 0), strict=True)),
    "best": dict(zip(SEEN + UNSEEN, (25, 20, 23, 11, 5, 1), strict=True)),
}

RunMaker = Callable[..., Path]
ResultMaker = Callable[..., TaskResult]


@pytest.fixture
def make_records(make_result: ResultMaker) -> Callable[..., list[TaskResult]]:
    """Six tasks with the last and the best checkpoint; `shift` is taken off every count."""

    def make(seed: int = 0, shift: int = 0, **changes: Any) -> list[TaskResult]:
        return [
            make_result(
                task=task,
                split="seen" if task in SEEN else "unseen",
                checkpoint=checkpoint,
                successes=max(0, SUCCESSES[checkpoint][task] - shift),
                iterations=30_000 if checkpoint == "last" else 24_000,
                seed=seed,
                **changes,
            )
            for checkpoint in ("last", "best")
            for task in SEEN + UNSEEN
        ]

    return make


def write_metrics(path: Path, seed: int, iterations: int = 30_000) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for iteration in range(100, iterations + 1, 100):
        names = ["loss/diffusion", "loss/critic", "loss/actor", "q/mean", "q/target"]
        if iteration % 3000 == 0:
            names += ["eval/seen_success", "eval/sweep-into-v3", "eval/unseen_success"]
        values = dict(zip(names, rng.uniform(0, 1, len(names)), strict=True))
        lines.append(json.dumps({"iteration": iteration, "wall_seconds": 0.015 * iteration} | values))
    path.write_text("\n".join(lines) + "\n")


def prompt_text(task: str) -> str:
    return (
        f"Task: Meta-World {task.removesuffix('-v3')}.\nObjective: bring the object to its goal.\n"
        "Constraints: the arm moves by small steps; 500 steps an episode.\nSuccess: the object is near the goal."
    )


def write_videos(folder: Path, tasks: tuple[str, ...]) -> None:
    for index, task in enumerate(tasks):
        frames = []
        for step in range(24):
            frame = np.full((120, 160, 3), 60 + 20 * index, np.uint8)
            frame[40:70, 5 * step : 5 * step + 30] = (230, 120, 40)
            frames.append(frame)
        info = {"success": index % 3 != 2, "seed": 1_000_000_000 + index, "steps": 24 + index, "checkpoint": "last"}
        save_video(folder, task, frames, info)


@pytest.fixture
def make_run(tmp_path: Path, make_records: Callable[..., list[TaskResult]]) -> RunMaker:
    """A function that writes a whole run folder; keyword arguments name what differs."""

    def make(
        name: str = "metaworld-0",
        *,
        seed: int = 0,
        shift: int = 0,
        records: list[TaskResult] | None = None,
        config: dict[str, Any] | None = None,
        videos: bool = False,
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        write_results(run / "results.json", make_records(seed, shift) if records is None else records)
        settings = {
            "preset": "metaworld",
            "seed": seed,
            "tasks": list(SEEN),
            "method": {"lr": 3e-4, "gamma": 0.99, "eta": 1.0},
            "prompts": {"text": True, "trajectory": True, "llm": "minilm"},
            "out": str(run),
        }
        (run / "config.json").write_text(json.dumps(settings | (config or {})))
        write_metrics(run / "metrics.jsonl", seed)
        prompts = {
            task: {
                "text": prompt_text(task),
                "text_source": "built in",
                "trajectory": {"source": "collected", "seed": 4711, "steps": 50},
            }
            for task in SEEN + UNSEEN
        }
        (run / "prompts.json").write_text(json.dumps(prompts))
        meta = {
            "versions": {"llmdpd": "0.1.0", "torch": "2.13.0", "metaworld": "3.1.1"},
            "machine": {"cpu": "2 cores", "system": "Linux", "gpu": None},
            "times": {"collect_seconds": 95.4, "train_seconds": 451.0, "evaluate_seconds": 7322.0},
            "command": ["python", "-m", "llmdpd.train", "--preset", "metaworld", "--seed", str(seed)],
        }
        (run / "meta.json").write_text(json.dumps(meta))
        if videos:
            write_videos(run / "videos", SEEN + UNSEEN[:2])
        return run

    return make


@pytest.fixture
def make_locomotion(make_result: ResultMaker) -> ResultMaker:
    """Makes valid locomotion records."""
    values: dict[str, Any] = {
        "task": "hopper-v5",
        "protocol": "d4rl",
        "trained_on": ("hopper-v5",),
        "training_data": "own SAC replay, not D4RL",
        "goal_visible": None,
        "successes": None,
        "returns_mean": 1523.4,
        "returns_std": 210.9,
        "normalised_score": 47.43,
    }
    return lambda **changes: make_result(**(values | changes))
