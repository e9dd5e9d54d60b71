"""docs/tutorials/first-policy.ipynb: stored without outputs, and executed from beginning to end at toy size."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llmdpd

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "first-policy.ipynb"
CONTENT: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
# Behind the last cell: what the reader would look at.
CHECKS = """
assert dataset.num_episodes == 8
for task, way in ways.items():
    assert way.shape == (STEPS + 1, 6) and np.isfinite(way).all()
    assert np.abs(np.diff(way[:, :2], axis=0)).max() <= 0.05 + 1e-9 and (way[0, 2:] == way[-1, 2:]).all()
assert not np.array_equal(ways["to-red"], ways["to-blue"])
assert weights.shape[0] == STEPS + 1 and weights.shape[2] == len(times)
assert (weights >= 0).all() and 0 < weights.sum(2).max() <= 1 + 1e-5
assert set(success) == set(TEXTS) and len(plt.get_fignums()) == 2
print("checked")
"""


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs() -> None:
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) >= (4, 5)
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(ids) == len(set(ids))
    for cell in CONTENT["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))


def test_its_links_lead_to_pages() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", "\n".join(cells("markdown")))
    assert len(links) >= 3
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_from_beginning_to_end_at_toy_size(tmp_path: Path) -> None:
    settings = {"LLMDPD_NOTEBOOK": "toy", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join([*cells("code"), CHECKS])],
        cwd=tmp_path,
        env={
            **os.environ,
            **settings,
            "PYTHONPATH": os.pathsep.join([str(Path(llmdpd.__file__).parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "checked"
