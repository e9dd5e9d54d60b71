"""What gets installed, and that it can be imported from everywhere: the checkout, and any other folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llmdpd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "gymnasium", "metaworld", "transformers", "minari", "h5py", "mujoco", "llmdpd._native"]


def python(code: str, *, executable: str = sys.executable, cwd: Path = ROOT, **env: str) -> str:
    """What `code` prints in a new process; its error output in the failure, where it fails."""
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_nothing_heavy() -> None:
    found = python(f"import sys, llmdpd; print([name for name in {HEAVY} if name in sys.modules])")
    assert found == "[]"


def test_lazy_attributes() -> None:
    code = (
        "import sys, llmdpd\n"
        "from llmdpd.errors import InputError\n"
        "assert llmdpd.InputError is InputError and {'InputError', 'Policy', 'build_info'} <= set(dir(llmdpd))\n"
        "assert 'torch' not in sys.modules\n"
        "from llmdpd.ops.build_info import build_info\n"
        "assert llmdpd.build_info is build_info\n"
        "try:\n"
        "    llmdpd.no_such_name\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    assert python(code) == "module 'llmdpd' has no attribute 'no_such_name'"


def test_the_diffusion_package_needs_torch_alone() -> None:
    unwanted = [name for name in HEAVY if name not in ("torch", "llmdpd._native")]
    code = f"import sys, llmdpd.diffusion; print([name for name in {unwanted} if name in sys.modules])"
    assert python(code) == "[]"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: building must leave the checkout as it is."""
    copy = tmp_path_factory.mktemp("source") / "llmdpd-checkout"
    copy.mkdir()
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "kernels", "llmdpd"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.fixture(scope="module")
def build_options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """C++ is compiled once for all installations, and without optimisation: nothing is computed by it here."""
    quick = {"LLMDPD_OPTIMISE": "-O0", "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF"}
    defined = (f"-Ccmake.define.{name}={value}" for name, value in quick.items())
    return (f"-Cbuild-dir={tmp_path_factory.mktemp('build')}", *defined)


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not llmdpd; the path of its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    executable = folder / "bin" / "python"
    own = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=str(executable)))
    visible = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    # A folder named in a .pth file comes after the environment's own packages, and its own .pth files, an editable
    # installation of llmdpd among them, are not read.
    (own / "outer.pth").write_text("\n".join(dict.fromkeys(visible)) + "\n")
    return executable


def install(executable: Path, *arguments: str | Path) -> None:
    """pip install without dependencies and with the build tools that are here, so that nothing is downloaded."""
    command = [str(executable), "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # --force-reinstall would try to uninstall an llmdpd that lies in the outer environment; ignoring it does not.
    done = subprocess.run(
        [*command, "--ignore-installed", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


WHERE = """
import llmdpd, llmdpd.kernels, llmdpd._native, llmdpd.errors
from llmdpd.ops import native
assert native.available() == (True, None), native.available()
assert llmdpd.build_info()["backends"]["cpp"]["available"]
print(llmdpd.__file__); print(llmdpd.errors.__file__); print(llmdpd._native.__file__); print(llmdpd.kernels.__file__)
"""


def where(executable: Path, cwd: Path) -> list[Path]:
    """Files of llmdpd, one of its modules, its compiled module and its kernels, as imported by a process in `cwd`."""
    lines = python(WHERE, executable=str(executable), cwd=cwd, PYTHONPATH="").splitlines()
    return [Path(line).resolve() for line in lines]


@pytest.mark.slow
def test_plain_install(source: Path, build_options: tuple[str, ...], tmp_path: Path) -> None:
    executable = make_environment(tmp_path / "env")
    install(executable, *build_options, source)
    packages = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=str(executable)))
    installed = (packages / "llmdpd").resolve()
    outside = where(executable, tmp_path)
    assert outside[0] == installed / "__init__.py"
    assert all(path.is_relative_to(installed) for path in outside)
    # In the checkout its own Python files come first; what only the installation has is found there.
    inside = where(executable, source)
    assert inside[:2] == [source / "llmdpd" / "__init__.py", source / "llmdpd" / "errors.py"]
    assert inside[2:] == outside[2:]
    # An installation exports the same C++ as the checkout.
    amalgamate = "from llmdpd.export.amalgamation import *; print(sources(), hash(amalgamated(sources())))"
    exported = [
        python(amalgamate, executable=str(executable), cwd=cwd, PYTHONPATH="", PYTHONHASHSEED="0").split()
        for cwd in (tmp_path, source)
    ]
    assert [Path(folder) for folder, _ in exported] == [installed / "csrc", source / "csrc"]
    assert exported[0][1] == exported[1][1]
    # transformers looks for a top-level package of that name.
    assert not (packages / "kernels").exists()
    scripts = {path.name for path in (tmp_path / "env" / "bin").glob("llmdpd-*")}
    commands = ("train", "collect", "evaluate", "report", "experiment", "pretrain")
    assert scripts == {f"llmdpd-{command}" for command in commands}


@pytest.mark.slow
def test_editable_install(source: Path, build_options: tuple[str, ...], tmp_path: Path) -> None:
    executable = make_environment(tmp_path / "env")
    install(executable, *build_options, "-e", source)
    for cwd in (tmp_path, source):
        package, module, native, kernels = where(executable, cwd)
        assert package == source / "llmdpd" / "__init__.py"
        assert module == source / "llmdpd" / "errors.py"
        assert kernels == source / "kernels" / "__init__.py"
        assert native.is_relative_to(tmp_path / "env")


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {llmdpd.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert llmdpd.__version__ in sections[:2]
    assert sections.index(llmdpd.__version__) == sections.count("Unreleased")
    tagged = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    releases = [tag for tag in tagged.stdout.split() if re.fullmatch(r"v\d.*", tag)]
    assert releases in ([], [f"v{llmdpd.__version__}"])


def test_the_workflows_take_their_commands_from_here() -> None:
    wheels, tests = ((ROOT / ".github" / "workflows" / f"{name}.yml").read_text() for name in ("wheels", "tests"))
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert "- run: .ci/run" in tests
    assert "cibuildwheel" in wheels
    (smoke,) = re.findall(r"\{project\}/(\S+)", configured["test-command"])
    assert (ROOT / smoke).is_file()


def pins(name: str) -> dict[str, set[str]]:
    """Package → the versions that a file of requirements names."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==([^ ;]+)", line):
            found.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return found


def test_the_lock_holds_all_that_is_needed_at_the_pinned_versions() -> None:
    """`pip install --require-hashes` refuses a file that lacks one dependency of a dependency."""
    locked, pinned = pins("requirements.lock"), pins("constraints.txt")
    assert {name: found for name, found in locked.items() if name in pinned and not found <= pinned[name]} == {}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, extras = declared["project"], ["train"]
    words = project["dependencies"] + declared["build-system"]["requires"]
    for name in extras:  # grows while the extras of extras are found
        words += project["optional-dependencies"][name]
        extras += [more for word in words for more in Requirement(word).extras if word.startswith("llmdpd[")]
        words = [word for word in words if not word.startswith("llmdpd[")]
    waiting = [Requirement(word) for word in words]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        assert name in locked, f"{name} is needed and not locked"
        with suppress(importlib.metadata.PackageNotFoundError):  # of the build, or of another system
            waiting += map(Requirement, importlib.metadata.requires(name) or ())
    assert any(name.startswith("nvidia-") for name in locked), (
        "what torch's CUDA build needs, of which a CPU build says nothing"
    )
