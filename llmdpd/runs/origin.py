"""The trained policy that a run starts from (`--init`): read, held against the run's configuration, written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmdpd.config.schema import TrainConfig
from llmdpd.config.stored import read_stored
from llmdpd.data import TrajectoryDataset
from llmdpd.data.config import DataConfig
from llmdpd.errors import InputError, abridged
from llmdpd.methods.base import Method
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.statistics import Observations
from llmdpd.policy.folder import DESCRIPTION, find_policy
from llmdpd.policy.policy import Policy
from llmdpd.prompts.source import LLMIdentity
from llmdpd.runs.data import Embeddings, training_data
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.specs import common_spec
from llmdpd.training.config import Statistics
from llmdpd.utils import ranks
from llmdpd.utils.checkpoint import latest_checkpoint, read_networks
from llmdpd.utils.files import atomic_write_json, read_json
from llmdpd.utils.plain import differences, from_plain, to_plain
from llmdpd.utils.progress import console

ActionRange = tuple[tuple[float, ...], tuple[float, ...]]
KEPT = "kept"
"""What is said of statistics that are the policy's."""
_WEIGHTS = "model.safetensors"
_FREE = ("dropout", "text_dropout", "trajectory_dropout")
"""Fields of a network that are about training alone: weights fit whatever they are."""


@dataclass(frozen=True)
class Replayed:
    """The tasks that a policy was trained on and that are learned further, and where their data are."""

    tasks: TaskConfig
    data: DataConfig


@dataclass(frozen=True)
class Origin:
    """What is known of the policy that a run starts from, as `init.json` of the run keeps it.

    source: as the user named it; policy: its folder; sha256: of its weights; iterations, trained_on: of its training;
    spaces: what its network was built for; llm: what embedded its texts; replay: None where nothing is replayed.
    """

    source: str
    policy: str
    sha256: str
    iterations: int
    trained_on: tuple[str, ...]
    spaces: Spaces
    llm: LLMIdentity | None = None
    replay: Replayed | None = None

    def __str__(self) -> str:
        return f"{self.source} (SHA-256 {self.sha256})"

    @property
    def replayed(self) -> tuple[str, ...]:
        """The tasks that are learned further."""
        return () if self.replay is None else self.replay.tasks.seen

    def metadata(self) -> dict[str, Any]:
        """What a policy says of where it started."""
        known = ("source", "sha256", "iterations", "trained_on")
        return {name: value for name, value in to_plain(self).items() if name in known}

    def check_llm(self, texts: Embeddings) -> None:
        """Raise `InputError` where another text model embeds the run's texts than the policy learned to read."""
        found = texts.llm
        if self.llm is None or found is None:
            return
        if (found.model, found.revision) != (self.llm.model, self.llm.revision):
            raise InputError(
                "the policy was trained with another text model",
                path=self.policy,
                field="llm",
                found=f"{found.model}, revision {found.revision}",
                expected=f"{self.llm.model}, revision {self.llm.revision}",
            )
        if found.dtype != self.llm.dtype:
            console.print(f"texts are embedded in {found.dtype}; the policy that is trained on read {self.llm.dtype}")

    def action_range(self, found: ActionRange, statistics: Statistics) -> ActionRange:
        """The actions that ±1 stand for: with `keep` the policy's, with `refit` the new data's own, `found`.

        With `auto` the policy's, as far as the new data are within, else the least range that holds both: actions
        beyond would be cut.
        """
        if statistics == "refit":
            return found
        low, high = self._actions(self.spaces)
        if statistics == "keep":
            return low, high
        return tuple(map(min, low, found[0])), tuple(map(max, high, found[1]))

    def said_of_actions(self, spaces: Spaces) -> str:
        """What became of the range of actions, in words."""
        own, its = self._actions(spaces), self._actions(self.spaces)
        changed = [
            f"action[{index}] {old[0]:g} to {old[1]:g} → {new[0]:g} to {new[1]:g}"
            for index, (old, new) in enumerate(zip(zip(*its, strict=True), zip(*own, strict=True), strict=True))
            if old != new
        ]
        return f"another range: {abridged(changed, 8)}" if changed else KEPT

    @staticmethod
    def _actions(spaces: Spaces) -> ActionRange:
        """The actions that ±1 stand for."""
        low, high = spaces.action_low, spaces.action_high
        return low or (-1.0,) * spaces.action_dim, high or (1.0,) * spaces.action_dim

    def replayed_data(self, check: Callable[[], None]) -> TrajectoryDataset | None:
        """The data of the tasks that are learned further; None where there are none. Errors: as `training_data`."""
        return None if self.replay is None else training_data(self.replay.data, self.replay.tasks, check)[0]


def find_origin(folder: RunFolder, config: TrainConfig) -> tuple[Origin, Policy | None]:
    """What is known of the policy that a run starts from, and the policy, which a run with a checkpoint needs no more.

    Raises:
        InputError: no such policy, one that does not fit the configuration, or another one than the run began with.
    """
    source = config.init.source
    assert source is not None, "checked by the caller"
    known = from_plain(Origin, read_json(folder.origin), folder.origin) if folder.origin.is_file() else None
    if known is not None and latest_checkpoint(folder.path / "checkpoint") is not None:
        return known, None
    path, commit = find_policy(source)
    sha256 = _hash(path)
    policy = Policy.load(path)
    if (now := _hash(path)) != sha256:
        hint = "wait until the run that writes it is done"
        raise InputError("the policy was replaced while it was read", path=path, found=now, expected=sha256, hint=hint)
    if known is not None and known.sha256 != sha256:
        raise InputError(
            "the policy that the run starts from was changed since the run was begun",
            path=path,
            field="SHA-256",
            found=sha256,
            expected=known.sha256,
            hint="put it back, or start a new run",
        )
    _check_network(policy, path, config)
    _check_tasks(policy, path, config)
    llm = policy.metadata.get("llm")
    origin = Origin(
        source=source if commit is None else str(commit),
        policy=str(path),
        sha256=sha256,
        iterations=policy.metadata.get("iterations", 0),
        trained_on=tuple(policy.metadata.get("trained_on", ())),
        spaces=policy.network.spaces,
        llm=None if llm is None else from_plain(LLMIdentity, llm, path / DESCRIPTION, "metadata.llm."),
        replay=_replayed(path, config) if config.init.replay else None,
    )
    if ranks.rank() == 0:
        atomic_write_json(folder.origin, to_plain(origin))
    console.print(
        f"starts from {origin.policy}: SHA-256 {sha256[:12]}…, {origin.iterations} iterations on "
        f"{abridged(origin.trained_on, 6)}",
        markup=False,
        soft_wrap=True,
    )
    again = [task for task in config.tasks.unseen if task in origin.trained_on]
    if again:
        console.print(f"{', '.join(again)}: the policy was trained on it before, so that it counts as seen")
    return origin, policy


def _hash(path: Path) -> str:
    """The SHA-256 of a policy's weights, as its description has it, to which `Policy.load` holds them."""
    description = read_json(path / DESCRIPTION)
    sums = description.get("sha256") if isinstance(description, dict) else None
    return str(sums.get(_WEIGHTS)) if isinstance(sums, dict) else ""


def _check_network(policy: Policy, path: Path, config: TrainConfig) -> None:
    """Hold the policy's method, network and text model against the configuration's."""
    if policy.method != config.method.name:
        found, expected = config.method.name, f"{policy.method}, which trained the policy"
        raise InputError("the policy is another method's", path=path, field="method", found=found, expected=expected)
    changed = differences(to_plain(policy.network.config), to_plain(config.method.network), "method.network.")
    changed = [line for line in changed if line.split(":")[0].split(".")[-1] not in _FREE]
    if changed:
        raise InputError(
            "the policy's network is another one than the configuration's",
            path=path,
            field=changed[0].split(":")[0],
            found="; ".join(changed),
            expected="the policy's own",
            hint="leave these options out: llmdpd train --init takes the network from the policy",
        )
    if policy.network.reads.text and policy.llm != config.llm:
        found, expected = config.llm, f"{policy.llm}, which embedded the policy's texts"
        raise InputError(
            "the policy reads another text model's embeddings", path=path, field="llm", found=found, expected=expected
        )


def _check_tasks(policy: Policy, path: Path, config: TrainConfig) -> None:
    """Hold what the policy observes and does against the tasks."""
    spaces, spec = policy.network.spaces, common_spec(config.tasks.all)
    sizes = {"state_dim": spaces.observed_dim, "action_dim": spaces.action_dim}
    for name, numbers in (("state_dim", "observation"), ("action_dim", "action")):
        if sizes[name] != getattr(spec, name):
            raise InputError(
                f"the policy has another size of {numbers}s than the tasks",
                path=path,
                field=f"spaces.{name}",
                found=f"{getattr(spec, name)}, of {spec.task}",
                expected=sizes[name],
            )
    names = ("observation keys", "goal_visible")
    own = (list(spec.observation), config.tasks.goal_visible)
    its = (list(policy.metadata.get("observation", ())), policy.metadata.get("goal_visible"))
    for name, found, expected in zip(names, own, its, strict=True):
        if expected is not None and found != expected:
            problem = f"the policy was trained on observations with other {name}"
            raise InputError(problem, path=path, field=name, found=found, expected=expected)


def _replayed(path: Path, config: TrainConfig) -> Replayed:
    """What of the training that the policy is from is learned further: its run says on which tasks, from which data."""
    file = path.parent / "config.json"
    if path.name not in ("policy", "policy_best") or not file.is_file():
        raise InputError(
            "only what a run was trained on can be replayed: its configuration says where the data are",
            path=path,
            field="init.replay",
            found="a policy without its run",
            expected="0, or --init with the run's folder",
        )
    trained = read_stored(read_json(file), file)
    if trained.tasks.file != config.tasks.file:
        raise InputError(
            "the policy was trained on the tasks of another task file",
            path=file,
            field="init.replay",
            found=f"{config.tasks.file}, and {trained.tasks.file} of the policy",
            expected="0, or one file with old and new tasks",
        )
    old = tuple(task for task in trained.tasks.seen if task not in config.tasks.all)
    if not old:
        found, expected = "the policy was trained on the run's tasks alone", "0"
        raise InputError("nothing to replay", path=file, field="init.replay", found=found, expected=expected)
    common_spec((*config.tasks.all, *old))
    return Replayed(dataclasses.replace(trained.tasks, seen=old, unseen=()), trained.data)


def check_spaces(origin: Origin, spaces: Spaces) -> None:
    """Raise `InputError` where observations, or embeddings, of the run are not laid out as the policy's."""
    for name in ("state_dim", "embedding_dim", "remembered", "layout"):
        found, expected = (_nameless(getattr(each, name)) for each in (spaces, origin.spaces))
        if found != expected:
            raise InputError(
                "observations have another layout than those that the policy was trained on",
                path=origin.policy,
                field=f"spaces.{name}",
                found="; ".join(differences(found, expected, f"{name}.")) if name == "layout" else found,
                expected="the run's → the policy's to be the same" if name == "layout" else expected,
            )


def _nameless(value: Any) -> Any:
    """Plain; of a layout its points by number, as their names decide nothing."""
    plain = to_plain(value)
    if not isinstance(plain, dict):
        return plain
    numbers = {point["name"]: f"point {number}" for number, point in enumerate(plain["points"])}
    points = [point | {"name": numbers[point["name"]]} for point in plain["points"]]
    pairs = [[numbers[name] for name in pair] for pair in plain["pairs"]]
    velocities = plain["velocities"] and [numbers[name] for name in plain["velocities"]]
    return plain | {"points": points, "pairs": pairs, "velocities": velocities, "goal": numbers.get(plain["goal"])}


def start_from(
    policy: Policy,
    network: PolicyNetwork,
    statistics: Statistics,
    observations: Observations,
    returns: Callable[[], Tensor],
) -> str:
    """Give a network a policy's weights and statistics; what became of the statistics, in words.

    Args:
        policy: of the same network. statistics: see `InitConfig`. observations, returns: as `PolicyNetwork.fit`.
    """
    network.load_state_dict(policy.network.state_dict())
    if statistics == "refit":
        network.fit(observations, returns)
        return "refitted to the new data"
    beyond = network.fit_beyond(observations, returns) if statistics == "auto" else []
    return f"kept, except {abridged(beyond, 8)}, which the new data lie far beyond" if beyond else KEPT


def take_over(learner: Method[Any, Any], origin: Origin, policy: Policy) -> list[str]:
    """Give a learner what was learned beside the policy; names of the networks that start anew."""
    path = Path(origin.policy)
    checkpoint = latest_checkpoint(path.parent / "checkpoint") if path.name == "policy" else None
    networks = {} if checkpoint is None else read_networks(checkpoint)
    return learner.take_over(policy.critic, networks, checkpoint or path)
