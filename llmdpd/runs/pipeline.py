"""A run from beginning to end: data, prompts, training, evaluation, report. Every part can be resumed."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from llmdpd.config.schema import TrainConfig
from llmdpd.data import TrajectoryDataset
from llmdpd.data.collecting.sac_trainer import require_sac
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import evaluate_tasks
from llmdpd.evaluation.latency import acting_cost
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.methods.lamo.checks import check_language, language_facts, with_language_sizes
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.networks import ASKED, ONLINE, make_network
from llmdpd.methods.registry import AnyAgent, make_agent, make_online_agent
from llmdpd.methods.sac import SAC, SACSteps
from llmdpd.nn.actor import SACActor
from llmdpd.nn.history_policy import HistoryPolicy
from llmdpd.nn.policy_network import Window
from llmdpd.ops import native
from llmdpd.ops.device import check_device, use_threads
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts import task_prompt
from llmdpd.runs.checks import check_values
from llmdpd.runs.data import Embeddings, embed_tasks, example_data, online_words, training_data
from llmdpd.runs.evaluate import evaluate_run, record_run
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.inputs import check_inputs, input_facts
from llmdpd.runs.prompt_choice import keep_prompts
from llmdpd.tasks import SELECTION_SEED_START
from llmdpd.tasks.locomotion import normalised_score
from llmdpd.tasks.simulation.rollout import EnvPool
from llmdpd.tasks.specs import canonical_task, task_spec
from llmdpd.training.batches import BatchSampler
from llmdpd.training.cuda_graph import check_cuda_graph, describe_cuda_graph, with_cuda_graph
from llmdpd.training.loop import Hooks, Sampler, TrainingLoop
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.plain import to_plain
from llmdpd.utils.progress import console


def prepare_config(config: TrainConfig) -> TrainConfig:
    """The configuration with names made canonical and defaults that hang on the machine made plain.

    Raises:
        InputError: an unknown task, a task both seen and unseen, no seen task, a device that is absent, a number out
            of range, fields that don't fit together.
    """
    device = check_device(config.device)
    check_cuda_graph(config.training.cuda_graph, device)
    _check_native(device)
    tasks = dataclasses.replace(
        config.tasks,
        seen=tuple(dict.fromkeys(canonical_task(task) for task in config.tasks.seen)),
        unseen=tuple(dict.fromkeys(canonical_task(task) for task in config.tasks.unseen)),
    )
    if not tasks.seen:
        raise InputError("no task to train on", field="tasks.seen", found="none", expected="at least one")
    both = sorted(set(tasks.seen) & set(tasks.unseen))
    if both:
        raise InputError("a task is both seen and unseen", field="tasks.unseen", found=", ".join(both))
    config = dataclasses.replace(_with_absolute_paths(config), tasks=tasks)
    if config.method == "lamo":
        config = with_language_sizes(config)
    check_values(config)
    return config


def _check_native(device: torch.device) -> None:
    """Raise `InputError` where the CPU is to train without the C++ module, which computes the networks there."""
    there, reason = native.available()
    if device.type == "cpu" and not there:
        raise InputError(
            "training on the CPU needs the C++ module", field="device", found=reason, expected="the module"
        )


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Folders and files made absolute, so that a run can be resumed from any directory; other names as they are."""

    def absolute(place: str) -> str:
        return place if place.startswith(("minari:", "d4rl:")) else os.path.abspath(os.path.expanduser(place))

    data = dataclasses.replace(
        config.data,
        path=None if config.data.path is None else absolute(config.data.path),
        prompts=None if config.data.prompts is None else absolute(config.data.prompts),
        root=absolute(config.data.root),
    )
    # The order in which the name is looked up: see llmdpd.prompts.models.
    folder = config.llm not in ("", "minilm") and Path(config.llm).expanduser().is_dir()
    llm = absolute(config.llm) if folder else config.llm
    lamo = config.lamo
    if config.method == "lamo":  # of other methods a folder of that name says nothing
        model, corpus = (
            absolute(place) if place and Path(place).expanduser().exists() else place
            for place in (lamo.model, lamo.corpus)
        )
        lamo = dataclasses.replace(lamo, model=model, corpus=corpus)
    return dataclasses.replace(config, data=data, llm=llm, lamo=lamo)


def execute(config: TrainConfig, run: RunFolder, stop: StopSignals) -> None:
    """Everything that the run folder does not hold yet.

    Raises:
        StopRequestedError: a stop was asked for; what was done is saved.
        InputError, TrainingDivergedError: see there.
    """
    if config.method == "lamo":
        check_language(config)
    _set_up_torch(config)
    tasks, online = (*config.tasks.seen, *config.tasks.unseen), config.method in ONLINE
    if online:
        require_sac("method")
    # First what needs the tasks alone: an LLM that is not there is told before minutes of collection.
    with run.timed("embedding_seconds"):
        texts = embed_tasks(config, tasks)
    stop.check()
    with run.timed("data_seconds"):
        dataset, words = (None, online_words(config)) if online else training_data(config, stop.check)
        examples = example_data(config, stop.check) if config.policy.context.trajectory else None
    stop.check()
    language = language_facts(config) if config.method == "lamo" else None
    facts = input_facts(config, dataset, examples, texts, language)
    check_inputs(run, facts)
    prompts = keep_prompts(run, examples, tasks, config.tasks.goal_visible)
    with EnvPool(config.data.workers, config.tasks.goal_visible) as pool:
        agent, sampler = _learner(config, run, dataset, texts)
        known = {text_key(text): vector for text, vector in texts.vectors.items()}
        targets = dataset.target_returns() if dataset is not None and config.method in ASKED else None

        def policy(iteration: int) -> Policy:
            own = _facts(config, words, texts, targets, iteration)
            return _snapshot(agent, config, known, own if language is None else {**own, "language_model": language})

        hooks = _hooks(config, run, policy, prompts, pool, stop)
        graphs, device = config.training.cuda_graph, check_device(config.device)
        trained = agent if isinstance(agent, SAC) else with_cuda_graph(agent, graphs, device)
        seconds = TrainingLoop(run.path, trained, sampler, config.training, hooks, facts).execute(stop)
    run.note(times={"training_seconds": round(seconds, 1)}, training={"cuda_graph": describe_cuda_graph(trained)})
    first = prompts[config.tasks.seen[0]]
    states = cast(SAC, agent).observations if dataset is None else dataset.observations
    run.note(acting=acting_cost(policy(config.training.iterations), first, states))
    with run.timed("evaluation_seconds"):
        evaluate_run(
            run, config.evaluation, prompts, workers=config.data.workers, device=config.device, check=stop.check
        )
    if config.evaluation.videos:
        with run.timed("recording_seconds"):
            record_run(run, config.evaluation, prompts, device=config.device, check=stop.check)


def _set_up_torch(config: TrainConfig) -> None:
    # Deterministic cuBLAS needs this before its first call; harmless elsewhere.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It comes with a fill of all new memory, to find who reads before writing: an operation more for each of them.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    use_threads(config.threads)
    torch.manual_seed(config.seed)


def _learner(
    config: TrainConfig, run: RunFolder, dataset: TrajectoryDataset | None, texts: Embeddings
) -> tuple[AnyAgent | SAC, Sampler]:
    """What learns, and what it learns from: a data set or, where there is none, the environments."""
    if dataset is not None:
        learner = _new_agent(config, dataset, texts)
        return learner, _batch_sampler(config, dataset, texts, learner.policy.window)
    spec = task_spec(config.tasks.seen[0])
    network = make_network(config.method, spec.state_dim, spec.action_dim, texts.width, config.policy)
    agent = make_online_agent(config, cast(SACActor, network))
    if check_device(config.device).type != "cpu":
        console.print(f"{config.method} trains on the CPU; {config.device} is for its evaluation")
    return agent, SACSteps(agent, run.replay)


def _new_agent(config: TrainConfig, dataset: TrajectoryDataset, texts: Embeddings) -> AnyAgent:
    network = make_network(config.method, dataset.state_dim, dataset.action_dim, texts.width, config.policy)
    network.to(check_device(config.device)).fit(torch.from_numpy(dataset.observations))
    if isinstance(network, HistoryPolicy):
        network.fit_returns(torch.from_numpy(dataset.returns_to_go()))
    return make_agent(config, network)


def _batch_sampler(config: TrainConfig, dataset: TrajectoryDataset, texts: Embeddings, window: Window) -> BatchSampler:
    context = config.policy.context
    rows = [texts.vectors[task_prompt(task).render()] for task in dataset.tasks] if texts.vectors else None
    return BatchSampler(
        dataset,
        None if rows is None else torch.stack(rows),
        context.encoder if context.trajectory else None,
        config.training.batch_size,
        config.training.prompts_per_batch,
        config.seed,
        check_device(config.device),
        config.training.augmentation if config.training.augmentation.active else None,
        (context.text_dropout, context.trajectory_dropout),
        *window,
    )


def _hooks(
    config: TrainConfig,
    run: RunFolder,
    policy: Callable[[int], Policy],
    prompts: dict[str, TaskPrompt],
    pool: EnvPool,
    stop: StopSignals,
) -> Hooks:
    """What the loop does at its marks; `policy` is the acting policy as it is now, after so many iterations."""
    seen = {task: prompts[task] for task in config.tasks.seen}
    return Hooks(
        select=lambda: _select(policy(0), seen, config, pool, stop.check),
        keep=lambda which, iteration: policy(iteration).save(run.policy(which)),
    )


def _snapshot(
    agent: AnyAgent | SAC, config: TrainConfig, known: dict[str, torch.Tensor], facts: dict[str, Any]
) -> Policy:
    """The acting policy as it is now: the EMA networks, and the critics where any are trained."""
    critic = copy.deepcopy(agent.critic) if isinstance(agent, LLMDPD) and config.trains_critic else None
    network = copy.deepcopy(agent.ema_policy).to(check_device(config.device))
    return Policy(network, critic, config.acting, llm=config.llm, texts=known, facts=facts)


def _facts(
    config: TrainConfig, words: str, texts: Embeddings, targets: dict[str, float] | None, iteration: int
) -> dict[str, Any]:
    return {
        "protocol": config.tasks.protocol,
        "trained_on": list(config.tasks.seen),
        "training_data": words,
        "goal_visible": config.tasks.goal_visible if task_spec(config.tasks.seen[0]).has_success else None,
        "seed": config.seed,
        "iterations": iteration,
        **({} if targets is None else {"target_returns": targets}),
        **({} if texts.llm is None else {"llm": to_plain(texts.llm)}),
    }


def _select(
    policy: Policy, prompts: dict[str, TaskPrompt], config: TrainConfig, pool: EnvPool, check: Callable[[], None]
) -> tuple[dict[str, float], float]:
    """Success on the seen tasks, on seeds apart from the reported ones: what `best` is chosen by.

    In locomotion the normalised score.
    """
    results = evaluate_tasks(
        policy,
        prompts,
        config.training.select_episodes,
        pool,
        first_seed=SELECTION_SEED_START,
        max_steps=config.evaluation.max_steps,
        progress=lambda done: check(),
    )
    if not task_spec(config.tasks.seen[0]).has_success:
        scores = {
            task: sum(normalised_score(task, r.episode_return) for r in episodes) / len(episodes)
            for task, episodes in results.items()
        }
        score = sum(scores.values()) / len(scores)
        return {"eval/seen_score": score, **{f"eval/{task}_score": value for task, value in scores.items()}}, score
    rates = {task: sum(r.success for r in episodes) / len(episodes) for task, episodes in results.items()}
    score = sum(rates.values()) / len(rates)
    return {"eval/seen_success": score, **{f"eval/{task}": rate for task, rate in rates.items()}}, score
