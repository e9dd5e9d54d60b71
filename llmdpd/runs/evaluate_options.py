"""The options of an evaluation, and which of them a run of some configuration can be evaluated with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.evaluation.prompts import other_text_names, swap_names
from llmdpd.nn.context.base import check_left_out
from llmdpd.policy.inputs import MOST_DEMONSTRATIONS
from llmdpd.tasks.specs import canonical_task, suite_of
from llmdpd.tasks.user import user_suite
from llmdpd.utils.bounds import Bounds, Episodes, OptionalEpisodes, WholeNumber, Workers, check_config
from llmdpd.utils.extras import extra

with extra("cli"):
    import tyro

_ACTING = ("samples", "noise_scale", "action_horizon", "contradicted_text", "track_after")
OptionalCount = Annotated[int | None, Bounds(1)]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate the policies of a run. Seeds are fixed, and apart from those of data and training."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The run's folder; a baseline does without one."""
    episodes: Episodes = 500
    """Episodes a task."""
    seen_episodes: OptionalEpisodes = None
    """Episodes a task that was trained on; by default as many."""
    baseline: Literal["replay", "tracker", "retrieve-and-play"] | None = None
    """Instead of the policies, evaluate a non-learned baseline: the demonstration's actions replayed, a hand-written
    tracker of the demonstration's hand, or the action of the nearest demonstrated state. On the run's tasks and
    prompts, or without a run on --tasks."""
    checkpoint: Literal["last", "best", "both"] = "both"
    """Which policy: the last one, the best by the selection during training, or both."""
    tasks: tuple[str, ...] = ()
    """Tasks; by default those of the run, seen and unseen."""
    tasks_file: Path | None = None
    """A task file (tasks.toml) whose tasks are evaluated, or those of them that --tasks names, with demonstrations from
    their own data; by default the run's own file, where it has one."""
    prompt_data: str | None = None
    """Data set to take the demonstrations from (Minari, HDF5, MTDiff files …); by default the run's own."""
    prompt_text: Path | None = None
    """Text file that replaces the text prompt of every evaluated task."""
    prompts: Literal["own", "swapped", "other-text", "no-trajectory", "no-text"] = "own"
    """Each task with its own prompts, with another task's (of the same split: seen or unseen), with its demonstration
    under the text of the task that shares it (of --protocol text), with the text alone, or with the demonstration alone
    (a policy can do without what prompt dropout taught it to do without)."""
    prompt_behaviours: tuple[str, ...] = ()
    """Evaluate once with demonstrations by each of these behaviour policies (clean, slow, pauses …: see llmdpd.collect
    --help), which are collected, or found again, under --data-root."""
    demonstrations: OptionalEpisodes = None
    """Demonstrations a task that the episodes take in turn; by default 1, or 5 by each behaviour that is named."""
    together: bool = False
    """The demonstrations of a task are one prompt, from which the policy retrieves together, instead of taking turns;
    then by default 5; of a policy at most 16."""
    data_root: Path | None = None
    """Folder under which collected demonstrations are kept; by default the run's, or data."""
    samples: OptionalCount = None
    """Actions sampled a state; by default the run's."""
    noise_scale: Annotated[float | None, Bounds(0)] = None
    """Factor on the sampler's noise; by default the run's."""
    action_horizon: OptionalCount = None
    """Actions of a chunk that are executed before the next is sampled; by default the run's."""
    contradicted_text: Literal["keep", "drop"] | None = None
    """What becomes of a text that contradicts its demonstration; by default the run's."""
    track_after: Annotated[float | None, Bounds(0)] = None
    """Lengths of the demonstration after which at the latest the tracker takes over from the policy, 0: never; by
    default the run's."""
    max_steps: OptionalCount = None
    """Steps an episode at most; by default the run's."""
    whole_episodes: bool = False
    """Go on after the success, to the limit of steps: returns are recorded beside successes."""
    videos: bool = False
    """Record a video of one episode a task: into the run's videos, or beside a file of its own in NAME-videos."""
    workers: Workers = None
    """Environment processes; one a core by default."""
    threads: WholeNumber = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda, cuda:N, or auto: a GPU that works, else the CPU."""
    out: Path | None = None
    """File for the results. By default the run's results.json, which is replaced, and its report is written anew; with
    other tasks, prompts, acting or steps, one checkpoint alone or fewer episodes, a new file in the run's folder
    evaluations."""

    def tasks_of(self, trained: TrainConfig) -> tuple[str, ...]:
        """Canonical names of the tasks to evaluate: those that are named, else those of the task file or the run."""
        suite = None if self.tasks_file is None else user_suite()
        others = trained.tasks.all if suite is None else tuple(suite.tasks)
        return tuple(dict.fromkeys(map(canonical_task, self.tasks))) or others

    @property
    def acting(self) -> dict[str, Any]:
        """The fields of the method's `ActingConfig` that options change."""
        values = {name: getattr(self, name) for name in _ACTING}
        return {name: value for name, value in values.items() if value is not None}


RENAMED_OPTIONS = {
    "--control": "--baseline",
    "--films": "--videos",
    "--examples": "--demonstrations",
    "--replan": "--action-horizon",
}
"""How the last version called options of `EvaluateConfig`."""


def check_evaluation(config: EvaluateConfig, trained: TrainConfig) -> None:
    """Refuse options with which a run of this configuration, there yet or not, cannot be evaluated.

    Raises:
        InputError: a number out of range; ways of acting or prompts that the method, or a baseline, does not have.
            Files, and what the tasks' environments or the trained network alone can tell, are not looked at.
    """
    check_config(config)
    if config.baseline is not None:
        _check_baseline(config)
    elif config.run is None:
        raise InputError("nothing to evaluate", field="RUN", found="neither a run nor --baseline", expected="one")
    for name, value in config.acting.items():
        if config.run is not None and not hasattr(trained.method.acting, name):
            found = f"{value}, of a run of {trained.method.name}"
            hint = f"leave {_option(name)} out"
            raise InputError("the method has no such way of acting", field=_option(name), found=found, hint=hint)
    _check_prompts(config, trained)


def _check_baseline(config: EvaluateConfig) -> None:
    defaults = EvaluateConfig()
    several = config.baseline == "retrieve-and-play"  # which alone can take demonstrations together
    for name in (*_ACTING, "checkpoint", "prompt_text", "together"):
        if getattr(config, name) != getattr(defaults, name) and not (name == "together" and several):
            raise InputError("a baseline has no use for this", field=_option(name), found=getattr(config, name))
    if config.prompts not in ("own", "swapped"):
        raise InputError(
            "a baseline follows a demonstration and reads no text",
            field="--prompts",
            found=config.prompts,
            expected="own or swapped",
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_prompts(config: EvaluateConfig, trained: TrainConfig) -> None:
    """Refuse prompts that the policy was trained without, and options that contradict each other."""
    context = trained.method.network.context_config()
    suite = suite_of(config.tasks_of(trained)[0])
    for behaviour in config.prompt_behaviours:
        if behaviour not in suite.behaviours:
            known = tuple(suite.behaviours)
            hint = f"nearest: {nearest_names(behaviour, known)}" if known else f"{suite.name} has no demonstrators"
            raise InputError(
                "unknown behaviour",
                field="--prompt-behaviours",
                found=behaviour,
                expected=", ".join(known) or "none",
                hint=hint,
            )
    asked = {
        "--prompt-data": config.prompt_data,
        "--prompt-behaviours": ", ".join(config.prompt_behaviours),
        "--demonstrations": config.demonstrations,
    }
    asked["--together"] = config.together
    given = [option for option, value in asked.items() if value]
    learned = config.baseline is None
    if config.together and learned and (config.demonstrations or 1) > MOST_DEMONSTRATIONS:
        raise InputError(
            "too many demonstrations for one prompt",
            field="--demonstrations",
            found=config.demonstrations,
            expected=f"1 to {MOST_DEMONSTRATIONS} with --together",
        )
    if config.together and learned and context.trajectory and not trained.method.network.reads_several:
        raise InputError("this run's policy reads one demonstration a prompt", path=config.run, field="--together")
    if config.prompt_data and config.prompt_behaviours:
        found = f"{config.prompt_data} and --prompt-behaviours"
        expected = "one of the two"
        raise InputError("demonstrations from two places", field="--prompt-data", found=found, expected=expected)
    if config.track_after and (config.prompts == "no-trajectory" or not context.trajectory):
        problem, expected = "without demonstrations there is nothing to track", "0, or none"
        raise InputError(problem, field="--track-after", found=config.track_after, expected=expected)
    if config.prompts == "no-trajectory" and given:
        raise InputError(
            "without demonstrations there is no choice of them", field="--prompts no-trajectory", found=", ".join(given)
        )
    reads_demonstrations = context.trajectory or config.baseline is not None
    may_lack_them = context.trajectory and context.trajectory_dropout
    option = f"--prompts {config.prompts}"
    needs = [] if reads_demonstrations else given
    needs = needs + (["--prompt-text"] if config.prompt_text and not context.text else [])
    if not reads_demonstrations and config.prompts == "no-text":
        needs.append(option)
    if not context.text and config.prompts == "no-trajectory" and not may_lack_them:
        needs.append(option)
    if not (context.text or reads_demonstrations) and config.prompts == "swapped":
        needs.append(option)
    if not context.text and config.prompts == "other-text":
        needs.append(option)
    if needs:
        raise InputError("this run's policy was trained without such prompts", path=config.run, field=needs[0])
    if config.prompts == "swapped":
        swap_names(config.tasks_of(trained), trained.tasks.seen)
    if config.prompts == "other-text":
        _check_other_text(config, trained)
    if config.prompts == "no-text" and context.text:
        check_left_out(context, "text")
    if config.prompts == "no-trajectory" and context.trajectory:
        check_left_out(context, "trajectory")


def _check_other_text(config: EvaluateConfig, trained: TrainConfig) -> None:
    if config.prompt_text is not None:
        raise InputError(
            "two texts for each task",
            field="--prompt-text",
            found=f"{config.prompt_text} and --prompts other-text",
            expected="one of the two",
        )
    other_text_names(config.tasks_of(trained))
