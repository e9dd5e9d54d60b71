from __future__ import annotations

from pathlib import Path
from typing import Any

from llmdpd.config.presets import PRESETS, with_method
from llmdpd.reporting.compare import differing_settings
from llmdpd.reporting.run import Run
from llmdpd.utils.plain import to_plain


def test_runs_of_two_methods_differ_by_the_method_and_not_by_where_they_lie() -> None:
    def run(name: str, **changes: Any) -> Run:
        plain = to_plain(with_method(PRESETS["smoke"], name)) | {"name": name, **changes}
        return Run(Path("runs/one"), (), plain)

    found = dict(differing_settings([run("td3-bc", seed=1), run("rad", seed=2, run_dir="elsewhere")]))
    assert found["method.name"] == ["td3-bc", "rad"]
    assert not {"name", "seed", "run_dir"} & found.keys()
    assert differing_settings([run("bc", seed=1), run("bc", seed=2)]) == []
