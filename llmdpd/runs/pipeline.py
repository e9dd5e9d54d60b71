"""A run from beginning to end, as a list of stages. Every one can be resumed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llmdpd.config.schema import TrainConfig
from llmdpd.data import Trajectory, TrajectoryDataset, join_datasets
from llmdpd.data.collecting.scripted import content_hash
from llmdpd.data.columns import blocks, extent
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import evaluate_tasks
from llmdpd.evaluation.offline import hold_out, offline_results, offline_selection, score_offline
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import CHECKPOINTS, write_results
from llmdpd.evaluation.scoring import acting_cost, selection_score
from llmdpd.methods import METHODS
from llmdpd.methods.base import Learner, Method, OfflineConfig
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.nn.spaces import ActionScaling, Spaces, action_range, limits
from llmdpd.nn.statistics import ColumnBlocks
from llmdpd.ops.native import use_threads
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts import task_prompt
from llmdpd.runs.data import Embeddings, demonstrations, embed_texts, training_data
from llmdpd.runs.evaluate import evaluate_run, load_policies, record_run
from llmdpd.runs.folder import RunFolder, decisive
from llmdpd.runs.origin import KEPT, Origin, check_spaces, find_origin, start_from, take_over
from llmdpd.runs.prompt_choice import keep_prompts, kept_prompts
from llmdpd.tasks import SELECTION_SEED_START
from llmdpd.tasks.simulation.rollout import EnvPool
from llmdpd.tasks.specs import shown_by, suite_of, task_spec
from llmdpd.tasks.user import file_in_use
from llmdpd.training.batches import BatchSampler
from llmdpd.training.cuda_graph import describe_cuda_graph, with_cuda_graph
from llmdpd.training.loggers import LOGGERS
from llmdpd.training.loop import Hooks, Sampler, Trained, TrainingLoop
from llmdpd.training.sharing import SharedUpdate, check_alike, own_share
from llmdpd.training.stopping import StopSignals
from llmdpd.utils import ranks
from llmdpd.utils.device import check_device
from llmdpd.utils.extras import check_installed
from llmdpd.utils.plain import to_plain
from llmdpd.utils.progress import console
from llmdpd.utils.sharding import Share


@dataclass
class Run:
    """A run under way: what the stages take and what they leave.

    Set by the stages: origin, the trained policy that it starts from, and first, that policy itself where it is still
    needed; texts, the embedded texts; dataset, None of a method that learns online; description, what is
    learned from in words; demonstrations, None where none are read; held_out, recorded episodes that are judged by, by
    task, where nothing is rolled out; hashes, of all that is learned from; prompts, by task; learner. share: this
    process's part of each batch, None where it is the only one. batches: those of another seed on the same data, where
    there is one in this process.
    """

    config: TrainConfig
    folder: RunFolder
    stop: StopSignals
    share: Share | None = field(init=False)
    origin: Origin | None = field(init=False)
    first: Policy | None = field(init=False)
    texts: Embeddings = field(init=False)
    dataset: TrajectoryDataset | None = field(init=False)
    description: str = field(init=False)
    demonstrations: TrajectoryDataset | None = field(init=False)
    held_out: Mapping[str, Sequence[Trajectory]] = field(default_factory=dict)
    hashes: dict[str, Any] = field(init=False)
    prompts: dict[str, TaskPrompt] = field(init=False)
    learner: Learner = field(init=False)
    batches: BatchSampler | None = None

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The tasks that the policy has learned, those of the policy that the run starts from after its own."""
        before = () if self.origin is None else self.origin.trained_on
        return tuple(dict.fromkeys((*self.config.tasks.seen, *before)))

    def policy(self, iteration: int) -> Policy:
        """The acting policy as it is now, after so many iterations."""
        config, learner, tasks = self.config, self.learner, self.config.tasks
        network = learner.acting_network
        metadata = {
            "protocol": tasks.protocol,
            "trained_on": list(self.trained_on),
            "training_data": self.description,
            "goal_visible": tasks.goal_visible if suite_of(tasks.seen[0]).hides_goal else None,
            "seed": config.seed,
            "iterations": iteration,
            **config.method.inputs(),
        }
        if self.origin is not None:
            metadata["init"] = self.origin.metadata()
        spec = task_spec(tasks.seen[0])
        if spec.observation:
            metadata["observation"] = list(spec.observation)
            metadata["observation_widths"] = list(spec.observation_widths)
        if self.dataset is not None and network.memory_length:
            metadata["target_returns"] = self.dataset.target_returns()
        if self.texts.llm is not None:
            metadata["llm"] = to_plain(self.texts.llm)
        return Policy(
            config.method.name,
            copy.deepcopy(network).to(check_device(config.device)),
            copy.deepcopy(learner.acting_critic),
            config.method.acting,
            llm=config.llm,
            texts={text_key(text): vector for text, vector in self.texts.vectors.items()},
            metadata=metadata,
        )


def execute(config: TrainConfig, folder: RunFolder, stop: StopSignals) -> None:
    """Everything that the run folder does not hold yet; by all processes of the run (`llmdpd.utils.ranks`) together.

    Raises:
        StopRequestedError: a stop was asked for; what was done is saved.
        InputError, TrainingDivergedError: see the stages.
    """
    run = Run(config, folder, stop)
    for stage in STAGES:
        ranks.together(stop.check)
        stage(run)
    ranks.first(folder.check_whole)


def set_up(run: Run) -> None:
    """Threads, seed and determinism of this process; what the method and the loggers need is here."""
    config = run.config
    ranks.after_first(partial(_check_here, config))
    run.share = own_share(METHODS[config.method.name], config.method)
    # Deterministic cuBLAS needs this before its first call; harmless elsewhere.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It comes with a fill of all new memory, to find who reads before writing: an operation more for each of them.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    use_threads(config.threads or ranks.cores())
    torch.manual_seed(config.seed)


def _check_here(config: TrainConfig) -> None:
    config.method.require()
    for name in ("data", "report"):  # which every run needs at its end at the latest
        check_installed(name)
    for name in config.training.logger:
        LOGGERS[name].require()
    ranks.check_device(check_device(config.device))
    own_share(METHODS[config.method.name], config.method)
    if ranks.count() > 1 and config.training.cuda_graph == "on":
        problem, field = "several processes train without CUDA graphs", "training.cuda_graph"
        raise InputError(problem, field=field, found=f"on, in {ranks.count()} processes", expected="auto or off")


def find_start(run: Run) -> None:
    """Find the trained policy that the run starts from, if it does."""
    run.origin, run.first = None, None
    if run.config.init.source is not None:
        run.origin, run.first = ranks.after_first(lambda: find_origin(run.folder, run.config))


def embed(run: Run) -> None:
    """Embed the tasks' texts: before the data, so that an absent LLM is reported before minutes of collection."""
    reads_text = run.config.method.network.context_config().text
    tasks = (*run.config.tasks.all, *(() if run.origin is None else run.origin.replayed))
    with run.folder.timed("embedding_seconds"):
        config, read = run.config, tasks if reads_text else ()
        run.texts = ranks.after_first(lambda: embed_texts(config.llm, config.device, read))
    if run.origin is not None:
        run.origin.check_llm(run.texts)


def prepare_data(run: Run) -> None:
    """Load or collect what is learned from, and the demonstrations of the evaluation."""
    data, tasks, method = run.config.data, run.config.tasks, run.config.method
    with run.folder.timed("data_seconds"):
        if METHODS[method.name].online:
            run.dataset, run.description = None, method.describe_online(run.config.training.iterations)
        else:
            run.dataset, words = ranks.after_first(lambda: training_data(data, tasks, run.stop.check))
            run.description = f"{words}; {method.use_of(run.dataset)}"
        reads = method.network.context_config().trajectory
        judged = tasks.all if run.config.evaluation_mode == "offline" else ()
        shown = partial(demonstrations, data, tasks, run.stop.check, judged)
        run.demonstrations = ranks.after_first(shown) if reads else None
    if run.config.evaluation_mode == "offline":
        assert run.dataset is not None, "checked by the configuration"
        split = hold_out(run.dataset, run.demonstrations, tasks.all, data.seed, keep_failed=data.keep_failed)
        run.dataset, run.demonstrations, run.held_out = split.learned, split.demonstrations, split.held_out
        run.description += f", of which {run.dataset.num_episodes} episodes are learned from, the others held out"
    origin = run.origin
    old = None if origin is None else ranks.after_first(lambda: origin.replayed_data(run.stop.check))
    if old is not None:
        assert run.dataset is not None, "a run that starts from a policy has data"
        run.dataset = join_datasets([run.dataset, old])
        share, tasks_of = run.config.init.replay, f"{old.num_episodes} episodes of {len(old.tasks)} tasks"
        run.description += f"; {100 * share:g} % of the prompts replay {tasks_of} that were learned before"


def hash_inputs(run: Run) -> None:
    """Know what is learned from by its hashes."""
    run.hashes = _hashes(run)


def check_resumable(run: Run) -> None:
    """Hold what is learned from against the run's checkpoint, where there is one.

    Raises:
        InputError: naming every setting and every input that is not the checkpoint's.
    """
    ranks.check_same("data and settings", hashlib.sha256(repr(run.hashes).encode()).hexdigest())
    ranks.first(lambda: run.folder.check_inputs(run.hashes))


def store_prompts(run: Run) -> None:
    """Put the evaluation's prompts into the run folder."""
    tasks, given = run.config.tasks, run.config.data.demonstrations
    what = (run.folder, run.demonstrations, tasks.all, tasks.goal_visible)
    kept = ranks.first(lambda: keep_prompts(*what, given))
    run.prompts = kept_prompts(*what) if kept is None else kept


def train(run: Run) -> None:
    """Train from the last checkpoint on, with selections and checkpoints at their marks."""
    with selection_pool(run.config) as pool:
        loop = training_loop(run, pool)
        note_training(run, loop, loop.execute(run.stop))


def selection_pool(config: TrainConfig) -> AbstractContextManager[EnvPool | None]:
    """The processes that selections roll out in, for as long as it is entered; None where they roll out nothing."""
    if config.evaluation_mode != "rollout":
        return nullcontext()
    return EnvPool(_workers(config), config.tasks.goal_visible)


def training_loop(run: Run, pool: EnvPool | None) -> TrainingLoop:
    """The run's learner with its first weights, in the loop that trains it; `pool`: see `selection_pool`."""
    config, training = run.config, run.config.training
    if config.evaluation_mode == "none":
        training = dataclasses.replace(training, select_every=0)
    run.learner, sampler = ranks.after_first(lambda: _offline(run) if run.dataset is not None else _online(run))
    trained: Trained
    if run.share is None:
        trained = with_cuda_graph(run.learner, training.cuda_graph, check_device(config.device))
    else:
        trained = SharedUpdate(run.learner, run.share)
        check_alike(run.learner)
    hooks = Hooks(
        select=lambda: _select(run, pool),
        keep=partial(_keep, run),
    )
    return TrainingLoop(run.folder.path, trained, sampler, training, hooks, run.hashes)


def note_training(run: Run, loop: TrainingLoop, seconds: float) -> None:
    """Note how long the training took, and how."""
    cuda_graph = describe_cuda_graph(loop.learner)
    run.folder.note(times={"training_seconds": round(seconds, 1)}, training={"cuda_graph": cuda_graph})


def _keep(run: Run, which: str, iteration: int) -> None:
    """Keep the `last` or `best` policy. The report that is there, of a run that goes beyond its end, is of others."""
    run.folder.report.unlink(missing_ok=True)
    run.policy(iteration).save(run.folder.policy(which))


def time_acting(run: Run) -> None:
    """Note what an action costs."""
    ranks.first(partial(_time_acting, run))


def _time_acting(run: Run) -> None:
    prompt = run.prompts[run.config.tasks.seen[0]]
    states = run.learner.visited_states() if run.dataset is None else run.dataset.observations
    run.folder.note(acting=acting_cost(run.policy(run.config.training.iterations), prompt, states))


def evaluate(run: Run) -> None:
    """Evaluate the last and the best policy on every task, and write results.json."""
    config, check = run.config, run.stop.check
    with run.folder.timed("evaluation_seconds"):
        if config.evaluation_mode == "rollout":
            workers = _workers(config)
            evaluate_run(run.folder, config.evaluation, run.prompts, workers=workers, device=config.device, check=check)
        elif config.evaluation_mode == "offline":
            policies = load_policies(run.folder, CHECKPOINTS, {}, config.device)
            records = offline_results(policies, run.prompts, run.held_out, check)
            ranks.first(lambda: write_results(run.folder.results, records))
        else:
            ranks.first(lambda: write_results(run.folder.results, []))


def record(run: Run) -> None:
    """Record videos of the last policy, where they are wanted."""
    ranks.first(partial(_record, run))


def _record(run: Run) -> None:
    config = run.config
    if config.evaluation.videos and config.evaluation_mode == "rollout":
        with run.folder.timed("recording_seconds"):
            record_run(run.folder, config.evaluation, run.prompts, device=config.device, check=run.stop.check)


STAGES: tuple[Callable[[Run], None], ...] = (
    set_up,
    find_start,
    embed,
    prepare_data,
    hash_inputs,
    check_resumable,
    store_prompts,
    train,
    time_acting,
    evaluate,
    record,
)
"""What a run does, in this order."""


def _hashes(run: Run) -> dict[str, Any]:
    """The settings that decide what is learned; SHA-256 of data, evaluation's demonstrations, embeddings, task file.

    What is not there (a data set, of a method that learns in the environment) is None. The method adds what it learns
    from beside them (`MethodConfig.inputs`).
    """
    config, embedded, file = run.config, hashlib.sha256(), file_in_use()
    for text, vector in run.texts.vectors.items():
        embedded.update(text.encode() + b"\0" + vector.numpy().tobytes())
    learned = {"training data": run.dataset, "demonstrations": run.demonstrations}
    hashes = {name: None if data is None else content_hash(data) for name, data in learned.items()}
    reads = config.method.network.context_config()
    if reads.trajectory and reads.encoder.trim != "none":
        # Demonstrations are cut by when they succeeded, which `content_hash` leaves out.
        steps = [None if data is None else data.success_steps for data in learned.values()]
        parts = (b"none" if step is None else step.tobytes() for step in steps)
        hashes["steps of success"] = hashlib.sha256(b"".join(parts)).hexdigest()
    return {
        "config": decisive(config),
        **hashes,
        "text embeddings": embedded.hexdigest() if run.texts.vectors else None,
        "task file": None if config.tasks.file is None or file is None else file.sha256,
        "init": None if run.origin is None else run.origin.sha256,
        **config.method.inputs(),
    }


def _offline(run: Run) -> tuple[Learner, Sampler]:
    """A method that learns from a data set, and its batches."""
    config, dataset, device = run.config, run.dataset, check_device(run.config.device)
    assert dataset is not None, "checked by the caller"
    kind = cast("type[Method[Any, Any]]", METHODS[config.method.name])
    method, spec = cast(OfflineConfig, config.method), task_spec(config.tasks.seen[0])
    bounds = (spec.action_low, spec.action_high)
    scale = action_range(dataset.actions, *bounds, spec.layout)
    if run.origin is not None:
        scale = run.origin.action_range(scale, config.init.statistics)
    layout, remembered = spec.layout.completed(dataset.state_dim) if spec.layout is not None else (None, ())
    width = dataset.state_dim + len(remembered)
    sizes = (width, dataset.action_dim, run.texts.width)
    spaces = Spaces(*sizes, layout, *scale, *limits(*bounds, scale), remembered)
    dataset = dataset.with_remembered(remembered)
    network = kind.build_network(spaces, method.network)
    learner = _learner(run, network.to(device), dataset)
    if run.batches is not None:
        return learner, run.batches.with_seed(config.seed)
    vectors = run.texts.vectors
    rows = [vectors[task_prompt(task).render()] for task in dataset.tasks] if vectors else None
    reads = method.network.context_config()
    return learner, BatchSampler(
        _within_bounds(dataset, network.action_scaling),
        None if rows is None else torch.stack(rows),
        reads.encoder if reads.trajectory else None,
        method.batch_size,
        method.prompts_per_batch,
        config.seed,
        device,
        (method.augmentation, layout) if method.augmentation.active and layout is not None else None,
        (reads.text_dropout, reads.trajectory_dropout),
        network.window.horizon,
        network.window.before,
        layout,
        method.self_prompted if reads.trajectory else 0.0,
        {task: shown_by(task) for task in dataset.tasks},
        () if run.origin is None else run.origin.replayed,
        config.init.replay,
        run.share,
    )


def _workers(config: TrainConfig) -> int | None:
    """Processes for the episodes that fall to this process; None leaves it to the pool."""
    return config.data.workers if ranks.count() == 1 else config.data.workers or ranks.cores()


def _learner(run: Run, network: PolicyNetwork, dataset: TrajectoryDataset) -> Method[Any, Any]:
    """The method with its first weights: random ones, or those of the policy that the run starts from."""
    config, origin, policy = run.config, run.origin, run.first
    kind = cast("type[Method[Any, Any]]", METHODS[config.method.name])
    observations = ColumnBlocks(dataset.observations) if dataset.stored else torch.from_numpy(dataset.observations)

    def returns() -> Tensor:
        return torch.from_numpy(dataset.returns_to_go())

    if origin is None:
        network.fit(observations, returns)
        return kind(network, config.method, config.training.iterations)
    check_spaces(origin, network.spaces)
    statistics = "" if policy is None else start_from(policy, network, config.init.statistics, observations, returns)
    learned = network.freeze_all_but_heads() if config.init.parts == "heads" else "all weights"
    learner = kind(network, config.method, config.training.iterations)
    if policy is not None:  # else the run's checkpoint has all of it, and the run's notes say so
        anew = ", ".join(take_over(learner, origin, policy)) or "nothing"
        actions = origin.said_of_actions(network.spaces)
        share = config.init.average if (statistics, actions) == (KEPT, KEPT) else 0.0
        notes: dict[str, Any] = {"from": str(origin), "learned": learned, "statistics": statistics}
        notes |= {"range of actions": actions, "anew": anew, "average": share}
        run.folder.note(init=notes)
        for name, words in notes.items():
            console.print(f"init, {name}: {words}", markup=False, soft_wrap=True)
    average = run.folder.notes().get("init", {}).get("average")
    if average is None:
        raise InputError("what the run noted of its start is gone", path=run.folder.meta, field="init.average")
    if average:
        learner.average_with_first(average)
    return learner


def _within_bounds(dataset: TrajectoryDataset, scaling: ActionScaling) -> TrajectoryDataset:
    """The data with actions as the networks know them; lines say how many rows are beyond the bounds, if any."""
    for actions in (dataset.actions, dataset.expert_actions):
        # None where the least and the greatest are within.
        if actions is not None and scaling.to_unit(np.stack(extent(actions)))[1]:
            beyond = sum(scaling.to_unit(block)[1] for block in blocks(actions))
            console.print(f"actions of {beyond} of {len(actions)} transitions are beyond their bounds: cut to them")
    return dataset.with_actions(lambda rows: scaling.to_unit(rows)[0], repr(scaling.parts().tolist()))


def _online(run: Run) -> tuple[Learner, Sampler]:
    """A method that learns in the environments of the seen tasks, and its steps there."""
    config, specs = run.config, [task_spec(task) for task in run.config.tasks.seen]
    kind, method = METHODS[config.method.name], config.method
    spaces = Spaces(specs[0].state_dim, specs[0].action_dim, run.texts.width, specs[0].layout)
    network = kind.build_network(spaces, method.network)
    if check_device(config.device).type != "cpu":
        console.print(f"{method.name} trains on the CPU; {config.device} is for its evaluation")
    return kind.in_environments(
        network,
        method,
        specs,
        steps=config.training.iterations,
        seed=config.seed,
        goal_visible=config.tasks.goal_visible,
        folder=run.folder.replay,
    )


def _select(run: Run, pool: EnvPool | None) -> tuple[dict[str, float], float]:
    """What `best` is chosen by, on the seen tasks: success or the normalised score, on seeds that are not reported.

    Without an environment, the error of actions on the episodes held out.
    """
    seen = {task: run.prompts[task] for task in run.config.tasks.seen}
    if pool is None:
        return offline_selection(score_offline(run.policy(0), seen, run.held_out, run.stop.check))
    results = evaluate_tasks(
        run.policy(0),
        seen,
        run.config.training.select_episodes,
        pool,
        first_seed=SELECTION_SEED_START,
        max_steps=run.config.evaluation.max_steps,
        progress=lambda done: run.stop.check(),
    )
    return selection_score(results)
