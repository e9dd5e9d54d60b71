"""Memory that processes share, and tensors that lie in it."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.utils import ranks


def refused(*_: Any) -> None:
    raise OSError("no space left")


def test_what_one_writes_all_read_after_they_met(in_processes: Any) -> None:
    def work(number: int) -> None:
        with ranks.joined():
            rows = ranks.shared_rows(30)
            assert rows is not None
            assert rows.tolist() == [0.0] * 30
            ranks.meet()
            rows[10 * number :][:10] = number + 1
            ranks.meet()
            assert rows.tolist() == [1.0] * 10 + [2.0] * 10 + [3.0] * 10
            assert ranks.shared_rows(20) is rows
            more = ranks.shared_rows(31)
            assert more is not None
            assert len(more) == 31

    assert in_processes(3, work) == [0, 0, 0]


def test_tensors_stay_the_same_objects_with_the_same_values(in_processes: Any) -> None:
    def work(number: int) -> None:
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 0), nn.Linear(5, 3))
        before, parameters = copy.deepcopy(network.state_dict()), list(network.parameters())
        transposed = torch.arange(6.0).view(2, 3).T
        with ranks.joined():
            assert not ranks.shares_memory(parameters)
            assert ranks.share_memory("weights", [*parameters, transposed, parameters[0]])
            assert all(one is other for one, other in zip(parameters, network.parameters(), strict=True))
            assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
            assert transposed.tolist() == [[0, 3], [1, 4], [2, 5]]
            assert all(parameter.requires_grad and ranks.shares_memory([parameter]) for parameter in parameters[:2])
            apart, file = copy.deepcopy(network), io.BytesIO()
            torch.save(parameters[1], file)
            assert len(file.getvalue()) < 4000, "the tensor alone, not all that lies beside it"
            ranks.meet()
            if number == 0:
                network.load_state_dict({name: value + 1 for name, value in before.items()})
            ranks.meet()
            assert all(torch.equal(value, before[name] + 1) for name, value in network.state_dict().items())
            assert all(torch.equal(value, before[name]) for name, value in apart.state_dict().items())
            # One that is put elsewhere is taken again, without the others.
            places = [parameter.data_ptr() for parameter in parameters]
            parameters[0].data = parameters[0].data.clone()
            assert not ranks.shares_memory([parameters[0]])
            assert ranks.share_memory("weights", parameters)
            assert ranks.shares_memory([parameters[0]])
            assert [parameter.data_ptr() for parameter in parameters[1:]] == places[1:]
        assert not ranks.shares_memory(parameters)

    assert in_processes(2, work) == [0, 0]


def test_values_that_differ_are_refused_by_all(in_processes: Any) -> None:
    def work(number: int) -> None:
        with ranks.joined(), pytest.raises(InputError, match="do not have the same weights"):
            ranks.share_memory("weights", [torch.full((4,), float(number))])

    assert in_processes(2, work) == [0, 0]


@pytest.mark.parametrize("fault", ["no file", "no room", "one cannot open it", "one finds another"])
def test_where_one_has_no_memory_none_shares(fault: str, in_processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(number: int) -> None:
        values: Tensor = torch.ones(40)
        with ranks.joined(), monkeypatch.context() as patch:
            if fault == "no file":
                patch.setattr(os, "memfd_create", refused)
            elif fault == "no room":
                patch.setattr(os, "posix_fallocate", refused)
            elif number and fault == "one cannot open it":
                patch.setattr(os, "open", refused)
            elif number:
                other = os.memfd_create("other")
                os.truncate(other, 4096)
                patch.setattr(os, "open", lambda *_: os.dup(other))
            place = values.data_ptr()
            assert not ranks.share_memory("weights", [values])
            assert ranks.shared_rows(3) is None
            assert values.data_ptr() == place
            assert not ranks.shares_memory([values])

    assert in_processes(2, work) == [0, 0]


def test_one_process_alone_shares_nothing() -> None:
    assert not ranks.share_memory("weights", [torch.ones(2)])
    assert ranks.shared_rows(2) is None
    ranks.meet()


def test_nothing_is_left_open(in_processes: Any) -> None:
    def work(number: int) -> None:
        with ranks.joined():
            before = len(list(Path("/proc/self/fd").iterdir()))
            assert ranks.share_memory("weights", [torch.ones(5000)])
            after = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
            assert len(after) <= before + 1, after  # the mapping's own

    assert in_processes(2, work) == [0, 0]
