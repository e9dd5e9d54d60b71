"""The documentation holds to its limits, and what it names exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path

import pytest

from llmdpd.__main__ import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOG = DOCS / "research-log"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if LOG not in page.parents)]
WITH_LOG = [*PAGES, *sorted(LOG.glob("*.md"))]
COMMANDS = ("train", "evaluate", "collect", "report", "experiment", "pretrain", "export", "tasks", "tune")
OTHERS = {"--index-url", "--policy", "--steps", "--level", "--agent", "--max-restarts"}
"""Options of pip and torchrun, of `llmdpd collect --policy sac`, which has a help of its own, and a former spelling."""
FENCE = re.compile(r"^ *```")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def lines(page: Path) -> Iterator[tuple[bool, str]]:
    """The page's lines, each with whether it is within a block of code."""
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            code = not code
        yield code or bool(FENCE.match(line)), line


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands between backticks outside blocks of code."""
    prose = "\n".join(line for code, line in lines(page) if not code)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def test_the_pages_are_few_words() -> None:
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES) <= 12_000
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


@every_page
def test_lines_are_short(page: Path) -> None:
    prose = [line for code, line in lines(page) if not code and not line.startswith("|")]
    assert [line for line in prose if len(line) > 100] == []


@pytest.mark.parametrize("page", WITH_LOG, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    places = re.compile(r"(llmdpd|csrc|kernels|bench|tests|docs|\.ci)/[\w./-]*")
    named = [span for span in spans(page) if places.fullmatch(span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def told(code: str) -> Iterator[str]:
    """The comments of Python code, and its strings that are statements: docstrings, also those of fields."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    yield from (
        token.string for token in tokenize.generate_tokens(StringIO(code).readline) if token.type == tokenize.COMMENT
    )


def resolves(name: str) -> bool:
    """Whether a dotted name leads to a module, or from one to an attribute, a field or an annotation."""
    module, parts = "llmdpd", name.split(".")[1:]
    while parts and importlib.util.find_spec(f"{module}.{parts[0]}"):
        module = f"{module}.{parts.pop(0)}"
        if not hasattr(importlib.import_module(module), "__path__"):
            break
    found: object = importlib.import_module(module)
    for part in parts:
        if part in getattr(found, "__annotations__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("folder", ["llmdpd", "kernels", "bench"])
def test_what_docstrings_and_comments_name_exists(folder: str) -> None:
    path = re.compile(r"(?<![\w./-])(?:(?:docs|llmdpd|kernels|bench|tests|csrc)/[\w./-]*\w|\.ci/\w+)")
    dotted = re.compile(r"(?<![\w./-])llmdpd(?:\.[A-Za-z_]\w*)+")
    lost = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = "\n".join(told(file.read_text(encoding="utf-8")))
        named = [(name, (ROOT / name).exists()) for name in path.findall(text)]
        named += [(name, resolves(name)) for name in dotted.findall(text)]
        # Words that stand for any name: llmdpd.cli.COMMAND, bench/results/act-NAME.json.
        lost += [f"{file}: {name}" for name, there in named if not there and not re.search("COMMAND|NAME", name)]
    assert lost == []


def test_the_navigation_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = re.findall(r"[\w/.-]+\.md\b", nav)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@every_page
def test_python_compiles_and_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmdpd":
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_reference_names_what_exists() -> None:
    for page in (DOCS / "reference" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            whole = importlib.util.find_spec(name) if attribute.islower() else None
            assert whole or hasattr(importlib.import_module(module), attribute), name


@pytest.fixture(scope="module")
def options(torch_settings: None) -> Callable[..., set[str]]:
    """The options that a command's help names: `options("train", "--method", "td3-bc")`."""

    @cache
    def ask(command: str, *words: str) -> set[str]:
        everything = "--help-all" if command == "train" else "--help"
        shown = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), suppress(SystemExit):
            patch.setenv("COLUMNS", "200")
            main([command, *words, everything])
        return set(re.findall(r"--[a-z][\w.-]*", shown.getvalue()))

    return ask


def expanded(option: str) -> list[str]:
    """`--a.{b,c}` → `--a.b`, `--a.c`."""
    parts = [part.strip("{}").split(",") for part in re.split(r"(\{[^}]*\})", option)]
    return ["".join(choice) for choice in product(*parts)]


@every_page
def test_options_exist(page: Path, options: Callable[..., set[str]]) -> None:
    known = set().union(*map(options, COMMANDS), options("train", "--method", "lamo"), OTHERS)
    missing = []
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        called = re.search(r"llmdpd[. ](\w+)(.*)", line.split("#")[0])
        if called is None or called[1] not in COMMANDS:
            continue
        own, _, trained = called[2].partition(" -- ")
        method = re.findall(r"--method [\w-]+", called[2])
        for command, part in ((called[1], own), ("train", trained)):
            # Names of methods that a page invents have the options of none.
            words = method[0].split() if method and command == "train" and "my-" not in method[0] else []
            given = re.findall(r"--[a-z][\w.-]*", part)
            missing += [option for option in given if option not in options(command, *words)] if given else []
    for span in spans(page):
        for option in re.findall(r"(?<![\w-])--[a-z][\w.{},-]*", span.replace("…", "")):
            missing += [one for one in expanded(option.rstrip(".,-")) if not any(k.startswith(one) for k in known)]
    assert missing == []


def test_the_site_builds_and_loads_nothing_remote(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    loaded = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?https?://"""
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
