"""From an experiment's name and options to its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from llmdpd.config.parse import Option, current_field, parse_train, split_options
from llmdpd.config.presets import ABLATED, PRESETS, with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, nearest_names
from llmdpd.experiments.cell import DECIDED, Cell
from llmdpd.experiments.grids import BUDGETS, FORMER_KEYS, GRIDS, Budget, Compared, Grid
from llmdpd.methods import METHODS
from llmdpd.prompts.cache import EmbeddingCache
from llmdpd.prompts.models import text_model
from llmdpd.runs.evaluate_options import EvaluateConfig, check_evaluation
from llmdpd.tasks import base_name
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.utils.bounds import Bounds
from llmdpd.utils.device import seen_device
from llmdpd.utils.extras import extra
from llmdpd.utils.plain import differences, to_plain
from llmdpd.utils.progress import error_console

with extra("cli"):
    import tyro


@dataclass(frozen=True)
class Settings:
    """What to run, and on how much of the machine."""

    experiment: Annotated[str, tyro.conf.Positional]
    """One of the experiments above."""
    protocol: str | None = None
    """Which tasks are trained on: paper (3 tasks), ml45 (45) or design (40 of those); of table2 d4rl. By default the
    experiment's first."""
    seeds: int = 3
    """Runs of each method, with the seeds 0, 1 …"""
    episodes: int | None = None
    """Evaluated episodes a task; by default the budget's, else the experiment's (500, of locomotion 100)."""
    seen_episodes: int | None = None
    """The same of a task that is trained on, of which ml45 has 45; by default as many."""
    budget: str = "full"
    """How much each run may take at most, by one of the names above."""
    out: Path | None = None
    """Folder of the runs and the page. Experiments share runs here. Default: experiments/PROTOCOL, or
    experiments/PROTOCOL-BUDGET."""
    data_root: Path = Path("data")
    """Folder of collected data, shared by all runs."""
    only: tuple[str, ...] = ()
    """Methods to run, by the names that their runs' folders begin with; by default all."""
    variants: bool = True
    """Evaluate with other prompts, and non-learned baselines, too, where the experiment has such; --no-variants: the
    runs alone."""
    jobs: int | None = None
    """Runs at once; by default one a GPU where there are any, else one a core; of a cluster, what it takes."""
    threads: int | None = None
    """CPU threads of a run; by default the cores shared out among the runs at once, of a cluster one."""
    device: str = "auto"
    """auto (GPUs where there are any; of a cluster none), cpu or cuda."""
    executor: str = "local"
    """local: processes of this machine. ray: the cluster that RAY_ADDRESS names, else a local one. slurm: its jobs."""
    slurm: tuple[str, ...] = ()
    """Parameters of the jobs, NAME=VALUE, as submitit calls them: slurm_partition=…, timeout_min=…"""
    mirror: str | None = None
    """URL of a folder (s3://BUCKET/FOLDER) that keeps the runs with each checkpoint, for machines without a common
    disk."""
    dry_run: bool = False
    """Show the runs, their state and, where a run of their method has finished, about how long they take; run nothing.
    """
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of llmdpd.train for all of the runs."""


@dataclass(frozen=True)
class Plan:
    """An experiment's cells, method by method, seed by seed; `chosen` are the methods to run, by their keys.

    `skipped`: methods that cannot run here (a language model's weights or a package is absent), and why.
    """

    settings: Settings
    grid: Grid
    protocol: str
    episodes: int
    out: Path
    chosen: tuple[str, ...]
    cells: dict[str, tuple[Cell, ...]]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def runnable(self) -> list[Cell]:
        """The chosen cells that can run here: every method's first seed before any method's second."""
        columns = [self.cells[key] for key in self.chosen if key not in self.skipped]
        return [cell for row in zip(*columns, strict=True) for cell in row]


def make_plan(settings: Settings, grids: dict[str, Grid] = GRIDS) -> Plan:
    """The cells of an experiment.

    Raises:
        InputError: an unknown experiment, protocol, budget or method, an impossible number, options that the
            experiment or a chosen method decides or lacks, that the training command refuses, or under which a chosen
            method could not be evaluated as the experiment does.
    """
    grid = grids[_known(settings.experiment, grids, "experiment")]
    protocol = _known(settings.protocol or grid.protocols[0], grid.protocols, "--protocol")
    budget = BUDGETS[_known(settings.budget, BUDGETS, "--budget")]
    for name, most in (("seeds", 1000), ("episodes", 100_000), ("seen_episodes", 100_000)):
        Bounds(1, most).check(getattr(settings, name), f"--{name.replace('_', '-')}")
    episodes = settings.episodes or budget.episodes or grid.episodes
    suffix = "" if settings.budget == "full" else f"-{settings.budget}"
    out = settings.out or Path("experiments") / f"{protocol}{suffix}"
    # A cluster's workers begin in other folders.
    out = out if settings.executor == "local" else out.absolute()
    keys = tuple(method.key for method in grid.methods)
    chosen = tuple(_known(key, keys, "--only") for key in dict.fromkeys(map(_current_key, settings.only))) or keys
    settings = dataclasses.replace(settings, data_root=settings.data_root.absolute())
    _check_options(settings.options, grid, chosen)
    plan = Plan(settings, grid, protocol, episodes, out, chosen, {})
    for method in grid.methods:
        cells = plan.cells[method.key] = _cells_of(plan, method, budget)
        if method.key in chosen:
            _check_evaluations(cells[0])
        reason = _absence(cells[0].config)
        # Where all is done, nothing needs the model or the package any more.
        if reason is not None and any(cell.state != "done" for cell in cells):
            plan.skipped[method.key] = reason
    return plan


def _current_key(key: str) -> str:
    """A method's key in this version's spelling."""
    if key not in FORMER_KEYS:
        return key
    message = f"--only {key} is now --only {FORMER_KEYS[key]}; the old spelling goes in the next version"
    error_console.print(message)
    return FORMER_KEYS[key]


def _folder(out: Path, key: str, seed: int) -> Path:
    """Of a method's run: where one is under the key that the method had, that one."""
    names = [f"{old}-seed{seed}" for old, now in FORMER_KEYS.items() if now == key]
    return next((out / name for name in names if (out / name).is_dir()), out / f"{key}-seed{seed}")


def _known(name: str, names: Collection[str], option: str) -> str:
    if name in names:
        return name
    hint = f"nearest names: {nearest_names(name, names)}"
    raise InputError(f"no such {option.strip('-')}", field=option, found=name, expected=", ".join(names), hint=hint)


def _check_options(options: Sequence[str], grid: Grid, chosen: Collection[str]) -> None:
    """Refuse options that another one decides already, or that would undo what a method stands for."""
    for option in split_options(options):
        fields = {method.key: _field(method, option) for method in grid.methods}
        for decided in {option.field, *fields.values()} & DECIDED.keys():
            raise InputError(
                "the experiment decides this option itself",
                field=option.name,
                found=f"{' '.join(option.words)}, after --",
                expected="options of llmdpd.train that the experiment leaves open",
                hint=DECIDED[str(decided)],
            )
        fit = [method.key for method in grid.methods if _is_open(method, option)]
        readers = [key for key, name in fields.items() if name is not None]
        if not readers:
            first = grid.methods[0]  # the training command says which options are near, or whose it is
            parse_train(("--preset", first.preset, *first.options, *option.words))
        # What the default method, whose ablations the tables compare, does not have is for those that have it.
        special = current_field(option, TrainConfig()) is None
        meant = [key for key in chosen if key in readers or not special] or chosen
        unfit = [key for key in meant if key not in fit]
        if unfit:
            raise InputError(
                "an option that a method of the experiment sets itself, or has no use for",
                field=option.name,
                found=f"{' '.join(option.words)}, after --, for {', '.join(unfit)}",
                expected="options of llmdpd.train that every chosen method leaves open, or that are one method's own",
                hint=f"leave it out, or run the others: --only {' '.join(fit)}" if fit else "leave it out",
            )


def _is_open(method: Compared, option: Option) -> bool:
    """Whether the user may set the option in the method's runs: the method has it, and does not stand for a value."""
    preset, field = PRESETS[method.preset], _field(method, option)
    own = {*method.fixed, *(option.field for option in split_options(method.options))}
    if own & {"data.noise", "data.post_success_steps"}:
        own.add("data.path")  # data from elsewhere has the noise, and the ends, that it has
    base = ABLATED.get(method.preset)
    if base is not None:
        own |= {line.split(":")[0] for line in differences(to_plain(PRESETS[base]), to_plain(preset))}
    return field is not None and field not in own


def _field(method: Compared, option: Option) -> str | None:
    """The field that the option sets in the method's runs; None where what learns there does not have it."""
    start = PRESETS[method.preset]
    chosen = dict(zip(method.options, method.options[1:], strict=False)).get("--method", start.method.name)
    return current_field(option, with_method(start, chosen))


def _cells_of(plan: Plan, method: Compared, budget: Budget) -> tuple[Cell, ...]:
    """The method's cells; of one that was not asked for, without options of the user's that don't fit it."""
    try:
        return _cells(plan, method, budget, plan.settings.options)
    except InputError:
        if method.key in plan.chosen:
            raise
    return _cells(plan, method, budget, ())


def _cells(plan: Plan, method: Compared, budget: Budget, options: Sequence[str]) -> tuple[Cell, ...]:
    settings = plan.settings
    protocol = ("--protocol", plan.protocol) if plan.protocol in PROTOCOLS else ()
    words = (*protocol, *method.options)
    # Of an experiment over several environments each has data of its own.
    task = base_name(PRESETS[method.preset].tasks.seen[0])
    # A method is shown without the options that it does not leave open: one that was not asked for, or another's own.
    given = [option for option in split_options(options) if _is_open(method, option)]
    own = tuple(word.replace("{task}", task) for option in given for word in option.words)
    # The device of each cell is decided where it runs: to look for the best one here would start CUDA.
    start = ("--preset", method.preset, "--device", seen_device())
    config = parse_train((*start, *words, *own))
    # An option of the user's own counts for more than the budget.
    words = (*words, *_budget_options(config, budget), *own)
    config = parse_train((*start, *words))
    variants = method.variants if settings.variants else ()
    return tuple(
        Cell(
            method=method.key,
            preset=method.preset,
            options=words,
            config=dataclasses.replace(config, seed=seed),
            folder=_folder(plan.out, method.key, seed),
            episodes=plan.episodes,
            data_root=settings.data_root,
            evaluations=tuple(variant.evaluation for variant in variants if seed == 0 or not variant.once),
            seen_episodes=settings.seen_episodes,
        )
        for seed in range(settings.seeds)
    )


def _check_evaluations(cell: Cell) -> None:
    """Refuse, before anything is trained, options that the run could not be evaluated with as the experiment does."""
    for evaluation in cell.evaluations:
        try:
            words = ("RUN", *cell.filled_in(evaluation.options))
            check_evaluation(tyro.cli(EvaluateConfig, args=words), cell.config)
        except InputError as error:
            raise InputError(
                f"with these options {cell.method} could not be evaluated as the experiment does "
                f"({evaluation.name}): {error.problem}",
                field=error.field,
                found=error.found,
                expected=error.expected,
                hint="leave the option out, run other methods (--only), or the runs alone: --no-variants",
            ) from None


def _budget_options(config: TrainConfig, budget: Budget) -> tuple[str, ...]:
    """What brings a configuration down to the budget."""
    options: list[str] = []
    if budget.iterations is not None and config.training.iterations > budget.iterations:
        options += ["--training.iterations", str(budget.iterations)]
    episodes = None if METHODS[config.method.name].online else budget.data_episodes
    if episodes is not None and config.data.episodes > episodes:
        options += ["--data.episodes", str(episodes)]
    shortened = () if budget.iterations is None else config.method.shortened(budget.iterations)
    return (*options, *shortened)


def _absence(config: TrainConfig) -> str | None:
    """Why a package or a language model that a run of this configuration needs is not here, and how to get it."""
    try:
        config.method.require()
        if config.method.network.context_config().text:
            text_model(config.llm).find(EmbeddingCache().folder / "fingerprints")
    except InputError as error:
        return "; ".join(part for part in (error.problem, error.hint) if part)
    return None
