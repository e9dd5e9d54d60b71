"""The core needs torch, numpy and safetensors; whatever else is imported names its extra where it is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmdpd.__main__ import COMMANDS
from llmdpd.errors import InputError
from llmdpd.utils.extras import EXTRAS, check_installed, extra

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CORE = {"numpy", "torch", "safetensors"}
# triton comes with torch where it runs; d4rl can't be required (see pyproject.toml) and has an error of its own.
FREE = CORE | {"llmdpd", "triton"}
# Where the import is not around the extra's error: the mark that works without.
EXEMPT = {("llmdpd/utils/options.py", "tyro")}
# Loggers, which nothing else needs; Trackio cannot be installed beside the tested versions.
APART = {"trackio", "wandb"}


def is_extra(node: ast.AST) -> ast.Call | None:
    """The call of `extra` that a with statement has, if it has one."""
    for item in node.items if isinstance(node, ast.With) else ():
        call = item.context_expr
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
            return call
    return None


def roots(node: ast.AST) -> list[str]:
    """The top-level packages that an import statement names; none for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) and not node.level else []


def imports(node: ast.AST, name: str | None = None) -> Iterator[tuple[str, str | None, ast.stmt]]:
    """Each package that is imported below `node`, the extra around it, and the import; none for type checkers alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if (call := is_extra(node)) is not None:
        assert isinstance(call.args[0], ast.Constant)
        name = str(call.args[0].value)
        assert any(roots(below) for below in ast.walk(node)), f"a block of {name} that imports nothing"
    for root in roots(node):
        yield root, name, node  # type: ignore[misc]
    for child in ast.iter_child_nodes(node):
        yield from imports(child, name)


def all_imports() -> list[tuple[str, str, str | None, str]]:
    """Imports from outside: file, package, extra around it, the statement."""
    found = []
    for path in sorted((ROOT / "llmdpd").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith("llmdpd/kernels/"):
            for package, name, node in imports(ast.parse(path.read_text(encoding="utf-8"))):
                if package not in FREE | sys.stdlib_module_names and (file, package) not in EXEMPT:
                    found.append((file, package, name, ast.unparse(node)))
    return found


ALL = all_imports()


def test_no_import_from_outside_stands_without_its_extra() -> None:
    assert [(file, line) for file, package, name, line in ALL if name is None or package not in EXTRAS[name]] == []
    assert len(ALL) > 60
    assert {name for _, _, name, _ in ALL} == set(EXTRAS)


@pytest.mark.parametrize(
    ("name", "package", "line"), sorted({(str(name), package, line) for _, package, name, line in ALL})
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    name: str, package: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as error, extra(name):
        exec(line, {})
    assert f"the package {package} is not installed: pip install 'llmdpd[{name}]'" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"the package {package} is not installed"):
        check_installed(name, package, field="tasks")


def test_another_missing_package_is_not_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmdpd_half_installed.py").write_text("import llmdpd_what_it_lacks\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="llmdpd_what_it_lacks"), extra("data"):
        import llmdpd_half_installed  # type: ignore[import-not-found]  # noqa: F401


def needed(waiting: list[str], extras: dict[str, list[str]]) -> set[str]:
    """Distributions that requirements come to, with this project's own extras and what is installed requires."""
    found: set[tuple[str, str]] = set()
    todo = [(Requirement(words), "") for words in waiting]
    while todo:
        requirement, within = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": within}):
            continue
        name = canonicalize_name(requirement.name)
        for more in requirement.extras or [""]:
            if (name, more) in found:
                continue
            found.add((name, more))
            try:
                words = extras[more] if name == "llmdpd" else importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # of another system
                continue
            todo += [(Requirement(word), more) for word in words]
    return {name for name, _ in found}


def test_each_extra_brings_what_is_imported_under_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {Requirement(words).name for words in project["dependencies"]} == CORE
    homes = importlib.metadata.packages_distributions()
    for name, packages in EXTRAS.items():
        brought = needed(extras[name], extras)
        for package in packages:
            if (package == "tomli" and sys.version_info >= (3, 11)) or (name in APART and package not in homes):
                continue
            assert {canonicalize_name(home) for home in homes[package]} & brought, (name, package)
    assert set(EXTRAS) - APART <= {name for words in extras["all"] for name in all_extras(Requirement(words), extras)}


def all_extras(requirement: Requirement, extras: dict[str, list[str]]) -> set[str]:
    found = set(requirement.extras)
    for name in requirement.extras:
        for words in extras[name]:
            if Requirement(words).name == "llmdpd":
                found |= all_extras(Requirement(words), extras)
    return found


SLIM = """
import importlib.metadata, runpy, sys, sysconfig
from packaging.requirements import Requirement

allowed, waiting = {"llmdpd"}, ["numpy", "torch", "safetensors"]
homes = {}
for package, names in importlib.metadata.packages_distributions().items():
    for name in names:
        homes.setdefault(name.lower().replace("_", "-"), set()).add(package)
seen = set()
while waiting:
    name = waiting.pop().lower().replace("_", "-")
    if name in seen or name not in homes:
        continue
    seen.add(name)
    allowed |= homes[name]
    for words in importlib.metadata.requires(name) or ():
        requirement = Requirement(words)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            waiting.append(requirement.name)
assert not {"metaworld", "h5py", "tyro", "rich", "transformers", "matplotlib", "gymnasium"} & allowed

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in allowed and root not in sys.stdlib_module_names and not root.startswith("__editable__"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] == "packaging"]:
    del sys.modules[name]
sysconfig.get_config_vars()  # it imports a module whose name is the platform's
sys.meta_path.insert(0, Refuse())

sys.argv[0] = "smoke.py"
runpy.run_path(sys.argv[1], run_name="__main__")

from llmdpd import InputError, Policy
from llmdpd.data import load_dataset
from llmdpd.__main__ import COMMANDS, main

with open(f"{sys.argv[2]}/data.hdf5", "wb") as file:
    file.write(b"\\x89HDF\\r\\n\\x1a\\n")
for use in (lambda: load_dataset(f"{sys.argv[2]}/data.hdf5"), lambda: Policy.load("hub:owner/name")):
    try:
        use()
    except InputError as error:
        print(error, file=sys.stderr)
assert main(["--help"]) == 0
for name in COMMANDS:
    assert main([name, "--help"]) == 2
"""


def test_the_core_alone_loads_prompts_and_acts_and_says_what_it_lacks(tmp_path: Path) -> None:
    """In a process whose imports refuse what torch, numpy and safetensors do not need themselves."""
    done = subprocess.run(
        [sys.executable, "-c", SLIM, str(ROOT / "tests" / "wheel" / "smoke.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    data, hub, *commands = done.stderr.splitlines()
    assert data == "the package h5py is not installed: pip install 'llmdpd[data]'"
    assert hub == "the package huggingface_hub is not installed: pip install 'llmdpd[hub]'"
    assert len(commands) == len(COMMANDS)
    for line in commands:
        assert line.startswith("error: the package ")
        assert "pip install 'llmdpd[cli]', or 'llmdpd[train]'" in line
