"""What is work of the device alone, and a CUDA graph can hold: nothing is read back, and nothing is the host's.

Shown twice: on the CPU by forbidding the operations that read values, and on `meta`, a device whose values can't be
read at all, by forbidding tensors of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Each needs the values of its input to know its result, or that result's shape.
READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.allclose),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.is_nonzero, aten.item, aten.nonzero_numpy),
}


class DeviceWork(TorchDispatchMode):
    """Fails on operations that read values, and, where `host` is false, on tensors of the CPU."""

    def __init__(self, host: bool) -> None:
        super().__init__()
        self.host = host
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert func.overloadpacket not in READS, f"{func} reads values"
        # An index that is a list, say: its copy to a device is waited for. A single number is no copy.
        listed = func.overloadpacket is aten.lift_fresh and any(t.ndim for t in given)
        assert not listed, f"{func} has a tensor of the host"
        if func.overloadpacket in (aten.repeat_interleave, aten.index, aten.index_put, aten.index_put_):
            assert not any(t.dtype == torch.bool for t in given[1:]), f"{func} by a mask: its shape depends on values"
            assert func is not aten.repeat_interleave.Tensor, f"{func} reads its counts"
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        assert self.host or all(t.device.type != "cpu" for t in given + made), f"{func} has a tensor of the host"
        return result
