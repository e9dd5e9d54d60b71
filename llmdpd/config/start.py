"""What a trained policy decides of the configuration of a run that starts from it: method, network, text model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

from llmdpd.config.presets import with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.base import OfflineConfig
from llmdpd.policy.folder import DESCRIPTION, read_policy_folder, resolve_policy
from llmdpd.policy.formats import UPGRADES
from llmdpd.utils.plain import from_plain

_ITERATIONS, _WARMUP = 1500, 100


def starting_from(start: TrainConfig, source: str, method: str | None) -> TrainConfig:
    """A preset's configuration with the method, the network and the text model of a trained policy.

    It learns for fewer iterations than from random weights, at half the preset's rate (docs/research-log/details.md).

    Args:
        start: the preset's. source: run, policy folder or hub:OWNER/NAME. method: the one that was asked for, if any.

    Raises:
        InputError: no such policy, a damaged one, or one of another method than was asked for.
    """
    path = resolve_policy(source)
    description, _ = read_policy_folder(path, UPGRADES)
    file, trained = path / DESCRIPTION, description["method"]
    if trained not in METHODS:
        raise METHODS.unknown(trained, field=f"method of {file}")
    if method not in (None, trained):
        expected = f"{trained}, which trained {path}"
        raise InputError("the policy is another method's", field="--method", found=method, expected=expected)
    config = with_method(start, trained)
    network = from_plain(get_type_hints(type(config.method))["network"], description["network"], file, "network.")
    learning: dict[str, Any] = {}
    if isinstance(config.method, OfflineConfig):
        learning = {"lr": config.method.lr / 2, "lr_warmup": min(config.method.lr_warmup, _WARMUP)}
    return replace(
        config,
        llm=description["llm"] if network.context_config().text else config.llm,
        method=replace(config.method, network=network, **learning),
        init=replace(config.init, source=source),
        training=replace(config.training, iterations=min(config.training.iterations, _ITERATIONS)),
    )
