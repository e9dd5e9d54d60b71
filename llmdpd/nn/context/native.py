"""What the C++ code is given of a retrieval context in training: features, waves."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from llmdpd.nn.feature_table import feature_tables
from llmdpd.nn.features import StateFeatures
from llmdpd.ops import native
from llmdpd.ops.packing import pack_features

Array = NDArray[np.float32]


class _Features(NamedTuple):
    """The tables of features packed, and what they were made of."""

    mean: Array
    std: Array
    isa: str
    packed: Any
    own: int
    geometry: int


_features: weakref.WeakKeyDictionary[nn.Module, _Features] = weakref.WeakKeyDictionary()


def read_features(features: StateFeatures, observations: Array) -> tuple[Array, Array]:
    """What `StateFeatures` makes of observations [N, S] with its present statistics: [N, F], and geometry [N, G]."""
    mean, std, isa = native.array(features.mean), native.array(features.std), native.module().active_isa()
    kept = _features.get(features)
    same = kept is not None and kept.isa == isa and np.array_equal(kept.mean, mean) and np.array_equal(kept.std, std)
    if kept is None or not same:
        tables = feature_tables(features)
        packed = pack_features(features.state_dim, *tables)
        kept = _Features(mean.copy(), std.copy(), isa, packed, len(tables.own[0]), len(tables.geometry[0]))
        _features[features] = kept
    own = np.empty((len(observations), kept.own), np.float32)
    geometry = np.empty((len(observations), kept.geometry), np.float32)
    kept.packed.features(observations, own, geometry, native.threads())
    return own, geometry


def waves_of(angles: Array) -> Array:
    """Sines and cosines of angles [..., N], side by side: [..., 2 N]."""
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)
