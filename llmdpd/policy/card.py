"""The model card of a policy: the hub's metadata, results and their intervals, training data, prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdpd.policy.hub import HUB, Commit
from llmdpd.utils.extras import extra
from llmdpd.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from llmdpd.evaluation.results import TaskResult
    from llmdpd.policy.policy import Policy

UNKNOWN_LICENCE = "unknown"
"""The hub's word for a licence that nobody has named."""
_TAGS = ("llmdpd", "reinforcement-learning", "offline-rl", "diffusion-policy", "robotics")
_PAPER = "[LLM-Driven Policy Diffusion](https://arxiv.org/abs/2509.00347)"


def model_card(
    policy: Policy,
    name: str,
    *,
    results: Sequence[TaskResult] = (),
    prompts: Mapping[str, str] | None = None,
    demonstrations: bool = False,
    licence: str = UNKNOWN_LICENCE,
) -> ModelCard:
    """The card of a policy that is pushed to a repository.

    Args:
        name: OWNER/NAME; of one that is only written, its folder's name.
        results: of this policy; each with its interval, where it has one.
        prompts: the text prompts of tasks, by their names.
        demonstrations: whether demonstrations lie beside the policy, in prompt_data/.
        licence: as the hub abbreviates it, such as "mit".
    """
    with extra("hub"):
        from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="llmdpd",
        license=licence,
        tags=[*_TAGS, policy.method],
        pipeline_tag="robotics",
        model_name=name.split("/")[-1],
        base_model=_base_model(policy),
        eval_results=[metric for result in results for metric in _metrics(result)] or None,
        ignore_metadata_errors=False,
    )
    parts = {
        "": _what(policy),
        "Use": _use(name if "/" in name else "OWNER/NAME", list(prompts or ()), policy, demonstrations),
        "Results": _results(results),
        "Training": _training(policy),
        "Prompts": _prompts(policy, prompts or {}),
        "Licence": _licence(licence),
    }
    head = f"# {name.split('/')[-1]}\n"
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{head}\n{body}\n", ignore_metadata_errors=False)


def _metrics(result: TaskResult) -> list[EvalResult]:
    """A result as entries of the hub's model-index; the interval, of 95 %, is among the metric's arguments."""
    with extra("hub"):
        from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="reinforcement-learning",
            task_name="reinforcement learning",
            dataset_type=result.protocol,
            dataset_name=result.task,
            dataset_config=result.task,  # by which the client tells one entry from another
            dataset_split=result.split,
            metric_type=kind,
            metric_name=kind.replace("_", " "),
            metric_value=value,
            metric_args={"episodes": result.episodes, **arguments},
        )
        for kind, value, arguments in _figures(result)
    ]


def _figures(result: TaskResult) -> list[tuple[str, float, dict[str, Any]]]:
    """What was measured: its name, its value, and its interval or deviation by name."""
    spread = {} if result.returns_std is None else {"standard_deviation": result.returns_std}
    interval = {} if result.ci95 is None else {"confidence_interval_95": list(result.ci95)}
    figures: list[tuple[str, float | None, dict[str, Any]]] = [
        ("success_rate", result.success_rate, interval),
        ("mean_return", result.returns_mean, spread),
        ("normalised_score", result.normalised_score, {}),
        ("action_error", result.action_error, {}),
    ]
    return [(name, value, arguments) for name, value, arguments in figures if value is not None]


def _what(policy: Policy) -> str:
    spaces, reads = policy.network.spaces, policy.network.reads
    kinds = [name for name, read in (("a text", reads.text), ("a demonstration", reads.trajectory)) if read]
    trained = "trained and evaluated as said below, and on nothing else"
    if "init" in policy.metadata:
        trained = "trained further from another policy, which is named below with what is known of it"
    return (
        f"A policy of {spaces.observed_dim} state and {spaces.action_dim} action numbers, prompted with "
        f"{' and '.join(kinds) or 'nothing'}, trained with the method `{policy.method}`, pushed by "
        f"llmdpd {__version__}, which rebuilds {_PAPER}.\n\nIt was {trained}. Keep your robot's own limits."
    )


def _use(name: str, tasks: Sequence[str], policy: Policy, demonstrations: bool) -> str:
    task = tasks[0] if tasks else "TASK"
    given = ['text="…"'] if policy.network.reads.text else []
    lines = ["from llmdpd import Policy", "", f'policy = Policy.load("{name}", revision="COMMIT")']
    if policy.network.reads.trajectory:
        given.append("trajectory=demonstration")
        if demonstrations:
            lines[:1] = [
                "from huggingface_hub import snapshot_download",
                "",
                "from llmdpd import Policy",
                "from llmdpd.data import load_dataset",
            ]
            lines += [
                f'folder = snapshot_download("{name}", revision="COMMIT", allow_patterns="prompt_data/*")',
                f'demonstration = load_dataset(f"{{folder}}/prompt_data", tasks=["{task}"]).episode(0)',
            ]
    lines += [f"policy.prompt({', '.join(given)})", "action = policy.act(observation)"]
    note = "COMMIT is a commit of this repository. JSON and safetensors alone are read; nothing is unpickled."
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{note}"


def _results(results: Sequence[TaskResult]) -> str:
    if not results:
        return "It was pushed without results."
    rows = ["| task | split | episodes | measured | value | spread |", "|---|---|---|---|---|---|"]
    for result in results:
        for kind, value, arguments in _figures(result):
            rows.append(
                f"| {_cell(result.task)} | {result.split} | {result.episodes} | {kind.replace('_', ' ')} "
                f"| {value:.4g} | {_spread(arguments)} |"
            )
    seeds, ways = {r.seed for r in results}, {str(r.acting) for r in results}
    return (
        "\n".join(rows) + "\n\nTasks that are `seen` were trained on, `unseen` ones were not. Success rates have 95 % "
        "Wilson intervals over episodes; one training is one sample of its seeds "
        f"(seed {', '.join(map(str, sorted(seeds)))}). Acting: {'; '.join(sorted(ways))}."
    )


def _spread(arguments: Mapping[str, Any]) -> str:
    if "confidence_interval_95" in arguments:
        low, high = arguments["confidence_interval_95"]
        return f"{low:.4g} to {high:.4g}"
    return f"± {arguments['standard_deviation']:.4g} (standard deviation)" if arguments else ""


def _training(policy: Policy) -> str:
    known = {
        "data": policy.metadata.get("training_data"),
        "tasks": ", ".join(policy.metadata.get("trained_on", ())),
        "protocol": policy.metadata.get("protocol"),
        "iterations": policy.metadata.get("iterations"),
        "seed": policy.metadata.get("seed"),
        "started from": _start(policy),
        "loaded from": str(Commit(**policy.metadata["hub"])) if "hub" in policy.metadata else None,
    }
    rows = [f"| {name} | {_cell(str(value))} |" for name, value in known.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *rows])


def _start(policy: Policy) -> str | None:
    """The policy that the training started from, in words."""
    if "init" not in policy.metadata:
        return None
    start = policy.metadata["init"]
    return f"{start['source']}, {start['iterations']} iterations, SHA-256 {start['sha256']}"


def _base_model(policy: Policy) -> str | None:
    """The repository, OWNER/NAME, of the policy that the training started from, where it is one of the hub."""
    source: str = policy.metadata.get("init", {}).get("source", "")
    return source.removeprefix(HUB).partition("@")[0] if source.startswith(HUB) else None


def _prompts(policy: Policy, prompts: Mapping[str, str]) -> str:
    identity = policy.metadata.get("llm")
    model = policy.llm if identity is None else f"{identity['model']}, {identity['revision']}, {identity['dtype']}"
    lines = [f"Text model: {model}." if policy.network.reads.text else "It reads no texts."]
    for task, text in prompts.items():
        fence = "`" * (1 + max(3, *(len(run) for run in re.findall("`+", text) or [""])))
        lines.append(f"{task}:\n\n{fence}text\n{text.strip()}\n{fence}")
    return "\n\n".join(lines)


def _licence(licence: str) -> str:
    if licence == UNKNOWN_LICENCE:
        return "Who pushed these weights named no licence: ask before you use them."
    return f"The weights: {licence}. The data that they were trained on may have terms of its own."


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
