"""Exporting a run's policy under the prompts of some of its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmdpd.diffusion.schedules import Precision, SamplerName
from llmdpd.errors import InputError
from llmdpd.export.contents import Prompt
from llmdpd.export.cpp import export_cpp
from llmdpd.export.onnx import export_onnx
from llmdpd.export.program import export_torch
from llmdpd.export.traced import Check
from llmdpd.ops.native import use_threads
from llmdpd.policy.inputs import MOST_DEMONSTRATIONS
from llmdpd.policy.policy import Policy
from llmdpd.runs.evaluate import load_policies
from llmdpd.runs.evaluate_options import EvaluateConfig, OptionalCount, check_evaluation
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompt_choice import prompt_sets
from llmdpd.utils.bounds import Bounds, check_config
from llmdpd.utils.extras import extra

with extra("cli"):
    import tyro

_ACTING = ("sampler", "steps", "precision")
"""Ways of acting that evaluations have no options for."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's policy, its prompts folded in, for a machine without this package."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--task"])] = ()
    """Tasks whose prompts are folded in, a file each."""
    to: Literal["cpp", "onnx", "torch"] = "cpp"
    """cpp: one C++ source with a C interface, weights and prompts as files, an example. onnx, torch: a model a task."""
    out: Path | None = None
    """The folder to write; by default export-cpp (-onnx, -torch) in the run's folder. An unaltered export there
    is replaced, with its folder build."""
    noise: Literal["input", "seed"] = "input"
    """Whether onnx and torch models take noise, or make it of a seed. C++ has a seed."""
    checkpoint: Literal["last", "best"] = "last"
    """Which policy: the last one, or the best by the selection during training."""
    prompt_data: Annotated[str | None, tyro.conf.arg(aliases=["--demonstration"])] = None
    """Data set to take the demonstrations from; by default the run's own."""
    demonstrations: Annotated[int, Bounds(1, MOST_DEMONSTRATIONS)] = 1
    """Demonstrations of a task, which are one prompt together; at most 16."""
    prompt_text: Path | None = None
    """Text file that replaces the tasks' text prompts."""
    prompts: Literal["own", "no-trajectory", "no-text"] = "own"
    """Text and demonstration, the text alone, or the demonstration alone."""
    samples: OptionalCount = None
    """Actions sampled a state; by default the run's."""
    noise_scale: Annotated[float | None, Bounds(0)] = None
    """Factor on the sampler's noise; by default the run's."""
    sampler: SamplerName | None = None
    """Sampler of the chain; by default the run's."""
    steps: OptionalCount = None
    """Denoising steps; by default the run's."""
    precision: Precision | None = None
    """Precision of the matrix products; by default the run's. Exports take fp32."""
    action_horizon: OptionalCount = None
    """Actions of a chunk that are executed before the next is sampled; by default the run's. C++ alone: others give the
    whole chunk."""
    contradicted_text: Literal["keep", "drop"] | None = None
    """What becomes of a text that contradicts its demonstration; by default the run's."""
    track_after: Annotated[float | None, Bounds(0)] = None
    """Lengths of the demonstration after which at the latest its tracker takes over, 0: never; by default the run's.
    C++ alone: others keep no state, and never hand over."""


def export_run(config: ExportConfig) -> tuple[Path, dict[str, Check]]:
    """Export as the options say; the folder that was written, and what the check of each model found.

    Raises:
        InputError: no run there; tasks without a prompt; a policy, or a way of acting, that cannot be exported.
    """
    check_config(config)
    if not config.tasks:
        raise InputError("no task to export for", field="--task", found="none", expected="a task, or several")
    _check_options(config)
    run = RunFolder.open(config.run)
    trained = run.read_config()
    run.use_tasks(trained, unchanged=False)
    use_threads(1)
    evaluated = _as_evaluation(config)
    with _own_options():
        check_evaluation(evaluated, trained)
        (prompts,) = prompt_sets(evaluated, run, trained)
    policy = load_policies(run, (config.checkpoint,), _acting(config, evaluated, trained.method), "cpu")[
        config.checkpoint
    ]
    out = run.path / f"export-{config.to}" if config.out is None else config.out
    _check_effect(config, policy)
    reads, given = policy.network.reads, {}
    for task, prompt in prompts.items():
        shown = list(prompt.demonstrations) if reads.trajectory else []
        together = (shown if len(shown) > 1 else shown[0]) if shown else None
        given[task] = Prompt(prompt.text if reads.text else None, together)
    if config.to == "cpp":
        export_cpp(policy, given, out)
        return out, {}
    export = export_onnx if config.to == "onnx" else export_torch
    return out, export(policy, given, out, seeded=config.noise == "seed")


def _check_options(config: ExportConfig) -> None:
    """Refuse options that have no effect beside others."""
    if config.to == "cpp" and config.noise == "seed":
        raise InputError("C++ always makes its noise of a seed", field="--noise", found="seed", hint="leave it out")
    if config.to != "cpp" and config.action_horizon is not None:
        found, problem = config.action_horizon, f"a model of --to {config.to} gives whole chunks"
        raise InputError(problem, field="--action-horizon", found=found, hint="leave it out")
    if config.to != "cpp" and config.track_after:
        problem = f"a model of --to {config.to} keeps no state, and never hands over"
        raise InputError(problem, field="--track-after", found=config.track_after, expected="0, or --to cpp")
    if config.prompts == "own":
        return
    useless = {"--contradicted-text": config.contradicted_text == "drop"}
    if config.prompts == "no-trajectory":
        useless |= {"--demonstrations": config.demonstrations > 1, "--prompt-data": config.prompt_data is not None}
        useless["--track-after"] = bool(config.track_after)
    for option, given in useless.items():
        if given:
            problem = f"this has no effect with --prompts {config.prompts}"
            raise InputError(problem, field=option, hint="leave it out")


def _check_effect(config: ExportConfig, policy: Policy) -> None:
    """Refuse to drop texts of a policy that cannot find a contradiction, and to track where none is read."""
    acts = policy.acting.describe(policy.network.config)
    if config.track_after and not acts.get("track_after"):
        found, expected = config.track_after, "a policy that reads demonstrations"
        problem = "this has no effect on the run's policy"
        raise InputError(problem, path=config.run, field="--track-after", found=found, expected=expected)
    if config.contradicted_text == "drop" and acts.get("contradicted_text") != "drop":
        expected = "a policy of single actions that learned to do without its text"
        problem = "this has no effect on the run's policy"
        raise InputError(problem, path=config.run, field="--contradicted-text", found="drop", expected=expected)


@contextmanager
def _own_options() -> Iterator[None]:
    """Errors of an evaluation's options by what they are called here: without --together and --prompt-behaviours."""
    try:
        yield
    except InputError as error:
        field = "--demonstrations" if error.field == "--together" else error.field
        hint = error.hint and error.hint.partition(", or collect")[0]
        raise InputError(
            error.problem, path=error.path, field=field, found=error.found, expected=error.expected, hint=hint
        ) from None


def _as_evaluation(config: ExportConfig) -> EvaluateConfig:
    """The evaluation that has these prompts and acts in this way."""
    shared = ("run", "tasks", "prompt_data", "prompt_text", "prompts", "samples", "noise_scale", "action_horizon")
    together = config.demonstrations > 1
    return EvaluateConfig(
        **{name: getattr(config, name) for name in (*shared, "contradicted_text", "track_after", "checkpoint")},
        demonstrations=config.demonstrations if together else None,
        together=together,
    )


def _acting(config: ExportConfig, evaluated: EvaluateConfig, method: Any) -> dict[str, Any]:
    own = {name: getattr(config, name) for name in _ACTING if getattr(config, name) is not None}
    for name, value in own.items():
        if not hasattr(method.acting, name):
            found = f"{value}, of a run of {method.name}"
            raise InputError("the method has no such way of acting", field=f"--{name}", found=found)
    return evaluated.acting | own
