"""The benchmarks of large data, and of many tasks, from their command line to their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import scale_costs
import scale_data
import torch

from llmdpd.tasks.user import use_no_file


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    use_no_file()


def test_data_on_the_disk_and_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, sizes = tmp_path / "x.json", ["--transitions", "5000", "--turns", "1", "--seconds", "0.01", "--batches", "2"]
    assert scale_data.main(["--compare", *sizes, "--folder", str(tmp_path), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert len(report["rates"]) == 3
    for row in report["rates"].values():
        assert min(row["memory"], row["shards"], row["ratio"]["median"]) > 0
    assert report["resident"]["transitions"] == 5000
    assert list(report["resident"]["stages"]) == list(scale_data.STAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"], "the shards are removed"
    assert "besides files' pages" in capsys.readouterr().out


def test_what_many_tasks_cost() -> None:
    found = scale_costs.measured(70, tuple(scale_costs.PARTS))
    assert found["megabytes"] > 0
    assert min(found["seconds"].values()) >= 0
    assert {"a batch", "look at each task's data", "schedule a cell"} <= found["seconds"].keys()
