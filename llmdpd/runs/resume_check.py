"""What a run learns from, as hashes in its checkpoints: a resumed run must find the same again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmdpd.config.schema import TrainConfig
from llmdpd.config.stored import read_stored
from llmdpd.data import TrajectoryDataset
from llmdpd.data.collecting.scripted import content_hash
from llmdpd.errors import InputError
from llmdpd.runs.folder import RunFolder, decisive
from llmdpd.tasks.user import file_in_use
from llmdpd.utils.checkpoint import latest_checkpoint, read_state
from llmdpd.utils.plain import differences


def input_hashes(
    config: TrainConfig,
    dataset: TrajectoryDataset | None,
    demonstrations: TrajectoryDataset | None,
    vectors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The settings that decide what is learned; SHA-256 of data, evaluation's demonstrations, embeddings, task file.

    What is not there (a data set, of a method that learns in the environment) is None. The method adds what it learns
    from beside them (`MethodConfig.inputs`).
    """
    embedded, file = hashlib.sha256(), file_in_use()
    for text, vector in vectors.items():
        embedded.update(text.encode() + b"\0" + vector.numpy().tobytes())
    return {
        "config": decisive(config),
        "training data": None if dataset is None else content_hash(dataset),
        "demonstrations": None if demonstrations is None else content_hash(demonstrations),
        "text embeddings": embedded.hexdigest() if vectors else None,
        **_success_steps(config, dataset, demonstrations),
        "task file": None if config.tasks.file is None or file is None else file.sha256,
        **config.method.inputs(),
    }


def _success_steps(config: TrainConfig, *datasets: TrajectoryDataset | None) -> dict[str, str]:
    """A hash of when episodes succeeded, where demonstrations are cut by it; `content_hash` leaves it out."""
    reads = config.method.network.context_config()
    if not reads.trajectory or reads.encoder.trim == "none":
        return {}
    digest = hashlib.sha256()
    for dataset in datasets:
        steps = None if dataset is None else dataset.success_steps
        digest.update(b"none" if steps is None else steps.tobytes())
    return {"steps of success": digest.hexdigest()}


def check_inputs(run: RunFolder, inputs: Mapping[str, Any]) -> None:
    """Hold `input_hashes` against the run's checkpoint, where there is one.

    Raises:
        InputError: naming every setting and every input that is not the checkpoint's.
    """
    checkpoint = latest_checkpoint(run.path / "checkpoint")
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    known = {name: state.get(name) for name in inputs}
    if known["config"] is not None:
        # Settings from after the checkpoint was written are at their defaults in it: what was done before there were.
        known["config"] = decisive(read_stored(known["config"], checkpoint / "state.json", "config."))
    changed = differences(known, dict(inputs))
    if changed:
        raise InputError(
            "the run cannot be resumed: what it learns from is not what its checkpoint learned from",
            path=checkpoint,
            found="; ".join(changed),
            expected="the same configuration, data and embeddings",
            hint="put them back as they were, or start a new run",
        )
