"""README's example and commands do what README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_example_drives_an_environment(run_copy: Path, torch_settings: None) -> None:
    (example,) = blocks("python")
    # The run that tests make knows other tasks, and is somewhere else.
    code = example.replace("runs/NAME", str(run_copy)).replace("box-close", "reach")
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["success"] or names["truncated"]


@pytest.mark.parametrize("name", ["main-command", "test-command"])
def test_the_two_commands_are_marked(name: str) -> None:
    # .ci/run takes the test command from between these lines.
    marked = re.search(rf"^<!-- {name} -->\n```bash\n(.+)\n```$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert marked is not None
    assert "-c constraints.txt" in marked[1]


def test_every_option_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    shown = {}
    for line in "".join(blocks("bash")).splitlines():
        for command, rest in re.findall(r"-m llmdpd\.(\w+)(.*)", line.split("#")[0]):
            shown.setdefault(command, set()).update(re.findall(r"--[\w.-]+", rest))
    assert set(shown) >= {"train", "collect", "evaluate"}
    for command, options in shown.items():
        with pytest.raises(SystemExit):
            importlib.import_module(f"llmdpd.{command}").main(["--help"])
        text = capsys.readouterr().out
        assert not [option for option in options if option not in text]
