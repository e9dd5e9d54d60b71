"""Configurations as run folders keep them, those of earlier versions among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import located
from llmdpd.methods import METHODS, legacy_fields
from llmdpd.utils.legacy import upgraded
from llmdpd.utils.plain import former_names, from_plain, to_plain


def read_stored(plain: Mapping[str, Any], path: Path, prefix: str = "") -> TrainConfig:
    """The configuration that was stored in the file `path`; fields that it does not have are at their defaults.

    Raises:
        InputError: an unknown field or method, or a value of another type, named by `prefix` and the field.
    """
    if isinstance(plain, Mapping) and isinstance(plain.get("method"), str):  # version 0.1's: the method's name
        if plain["method"] not in METHODS:
            with located(path):
                raise METHODS.unknown(plain["method"], field=f"{prefix}method")
        method = METHODS[plain["method"]].Config()
        with located(path, prefix.removesuffix(".")):
            default = TrainConfig(method=method)
            old = {name: value for name, value in plain.items() if name != "method"}
            plain = upgraded(old, method.legacy, to_plain(default), legacy_fields, former_names(default))
    return from_plain(TrainConfig, plain, path, prefix)
