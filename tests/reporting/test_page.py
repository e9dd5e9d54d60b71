"""The page, read back by an HTML parser: its figures are those of results.json, it loads nothing, it escapes all."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from llmdpd.cli.report import main
from llmdpd.errors import InputError
from llmdpd.evaluation.intervals import wilson_interval
from llmdpd.evaluation.results import PromptUse, TaskResult, read_results
from llmdpd.reporting.page import build_report
from llmdpd.tasks.metaworld.names import ML45_TRAIN

RunMaker = Callable[..., Path]
ResultMaker = Callable[..., TaskResult]
PageMaker = Callable[..., "Page"]
VOID = {"meta", "img", "br", "link", "hr", "input", "col"}


class Page(HTMLParser):
    """Text, attributes, tables (rows of cell texts) by the id of their section; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"

    @property
    def section(self) -> str:
        return next((name for _, name in reversed(self.open) if name), "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") if tag == "section" else None))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if any(tag == "style" for tag, _ in self.open):
            return
        self.texts[self.section] = self.texts.get(self.section, "") + data.replace("\u00a0", " ")
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.tables[self.section][-1][-1] += data + " "

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts.values()).split())

    def row(self, section: str, name: str, which: int = 0) -> list[str]:
        """The cells of a table's row by the text of its first cell."""
        rows = [row for row in self.tables[section] if row and row[0].strip() == name]
        return [" ".join(cell.split()) for cell in rows[which][1:]]


@pytest.fixture
def page_of(make_run: RunMaker) -> PageMaker:
    """The page of one run; keywords as of `make_run`."""
    return lambda **changes: Page(build_report([make_run(**changes)]))


def heads(page: Page, task: str) -> list[str]:
    """The rates in a task's row of the table."""
    return [cell.split()[0] for cell in page.row("success", task)]


def test_every_figure_of_the_table_is_that_of_the_results_file(make_run: RunMaker) -> None:
    run = make_run()
    path = build_report([run])
    assert path == run / "report.html"
    page = Page(path)
    records = read_results(run / "results.json")
    assert len(records) == 12
    for record in records:
        cell = page.row("success", record.task)[("last", "best").index(record.checkpoint)]
        assert record.successes is not None
        low, high = wilson_interval(record.successes, record.episodes)
        expected = f"{4 * record.successes:.1f} {100 * low:.1f} to {100 * high:.1f} {record.successes}/25"
        assert cell == expected
    for index, split in enumerate(("unseen", "seen")):
        for column, checkpoint in enumerate(("last", "best")):
            rates = [100 * (r.successes or 0) / 25 for r in records if (r.split, r.checkpoint) == (split, checkpoint)]
            assert page.row("success", "mean over tasks", index)[column] == f"{mean(rates):.1f}"
            assert f"{mean(rates):.1f} % of episodes on average" in page.text
    rows = [row[0].strip() for row in page.tables["success"]]
    assert rows.index("unseen: never trained on") < rows.index("box-close-v3") < rows.index("seen: trained on")
    assert rows.index("seen: trained on") < rows.index("disassemble-v3")


def test_the_papers_figures_stand_beside_and_are_labelled(page_of: PageMaker) -> None:
    page = page_of()
    for task, own, baseline in (
        ("box-close-v3", "75.24 ± 4.90", "65.73 ± 8.36"),
        ("hand-insert-v3", "78.71 ± 5.33", "70.87 ± 3.59"),
        ("bin-picking-v3", "74.65 ± 6.28", "55.73 ± 7.63"),
        ("sweep-into-v3", "91.84 ± 2.42", "92.87 ± 1.11"),
        ("coffee-push-v3", "76.56 ± 2.89", "74.67 ± 6.79"),
        ("disassemble-v3", "72.30 ± 6.48", "69.00 ± 4.72"),
    ):
        assert page.row("success", task)[2:] == [own, baseline]
    assert "reported by the paper, other data and compute" in page.text
    assert "trained on the evaluated task's own data" in page.text


def test_a_task_that_the_paper_lacks_or_counts_otherwise_says_so(page_of: PageMaker, make_result: ResultMaker) -> None:
    page = page_of(
        records=[make_result(task="box-close-v3", split="seen"), make_result(task="reach-v3", split="unseen")]
    )
    assert page.row("success", "box-close-v3")[1:] == ["75.24 ± 4.90 (unseen there)", "65.73 ± 8.36 (unseen there)"]
    assert page.row("success", "reach-v3")[1:] == ["not in the paper", "not in the paper"]
    assert page.row("success", "mean over tasks")[1:] == ["not in the paper", "not in the paper"]


def test_what_the_results_were_trained_on_is_said(page_of: PageMaker, make_result: ResultMaker) -> None:
    page = page_of(records=[make_result(goal_visible=False, prompts=PromptUse(text=False, trajectory="expert set B"))])
    for name, value in {
        "trained on": "sweep-into-v3, coffee-push-v3, disassemble-v3",
        "training data": "scripted experts, noise mix, 100 episodes a task",
        "goal in the observation": "hidden",
        "text prompt": "off",
        "trajectory prompt": "expert set B",
        "iterations": "30,000 (last)",
        "steps an episode": "at most 500",
        "acting": "1 sample, ddpm in 5 steps, noise scale 1",
    }.items():
        assert page.row("metadata", name) == [value]


@pytest.mark.parametrize(
    ("successes", "episodes", "counted", "span"),
    [
        ((0, 0), 1, "for 1 episode a task", "(the same on each)"),
        ((0, 5), 25, "for 25 episodes a task", "(from 0.0 % on box-close-v3 to 20.0 % on hand-insert-v3)"),
    ],
)
def test_the_summary_counts_and_spans(
    page_of: PageMaker, make_result: ResultMaker, successes: tuple[int, int], episodes: int, counted: str, span: str
) -> None:
    tasks = zip(("box-close-v3", "hand-insert-v3"), successes, strict=True)
    records = [make_result(task=task, split="unseen", successes=count, episodes=episodes) for task, count in tasks]
    text = page_of(records=records).text
    assert counted in text
    assert span in text


def test_other_ways_of_evaluating_stand_apart(
    page_of: PageMaker, make_records: Callable[..., list[TaskResult]]
) -> None:
    """No figure is a mean over episodes of other lengths, other ways of acting, or other prompts."""
    first = make_records()
    shorter = [dataclasses.replace(record, max_steps=150) for record in first]
    many = [dataclasses.replace(record, acting=dataclasses.replace(record.acting, samples=50)) for record in first]
    page = page_of(records=first + shorter + many)
    assert len(page.row("success", "sweep-into-v3")) == 3 * 2 + 2
    for words in ("at most 150", "of 50, ddpm"):
        assert words in page.text
    page = page_of(name="b", records=first + make_records(prompts=PromptUse(text=False, trajectory=True), shift=4))
    assert heads(page, "sweep-into-v3")[:4] == ["96.0", "100.0", "80.0", "84.0"]
    headers = [" ".join(cell.split()) for cell in page.tables["success"][0]]
    assert headers[1:3] == ["text prompt on: success, %", "text prompt off: success, %"]


def test_configuration_versions_times_prompts_and_command_are_there(make_run: RunMaker) -> None:
    run = make_run(config={"method": {"lr": 1e-4, "layers": [256, 256]}})
    page = Page(build_report([run]))
    for name, value in {
        "method.lr": "0.0001",
        "method.layers": "256, 256",
        "torch": "2.13.0",
        "gpu": "not set",
        "collect_seconds": "1 min 35 s",
        "evaluate_seconds": "2 h 02 min",
    }.items():
        assert page.row("", name) == [value]
    assert "python -m llmdpd.train --preset metaworld --seed 0" in page.text
    assert "Task: Meta-World coffee-push." in page.text
    assert "Text: built in. Demonstration: source collected, seed 4711, steps 50." in page.text
    meta = json.loads((run / "meta.json").read_text())
    for command in ("llmdpd-train --seed 3", {"argv": ["llmdpd-train", "--seed", 3]}):
        (run / "meta.json").write_text(json.dumps(meta | {"command": command}))
        assert "llmdpd-train --seed 3" in Page(build_report([run])).text


def test_videos_are_in_the_page_or_strips_in_their_place(make_run: RunMaker) -> None:
    run = make_run(videos=True)
    page = Page(build_report([run]))
    videos = [value for tag, name, value in page.attributes if (tag, name) == ("video", "src")]
    assert len(videos) == 5
    assert all(value.startswith("data:video/mp4;base64,") for value in videos)
    assert "no success, 26 steps, last checkpoint, seed 1000000002" in page.text
    assert "Without a video here: " in page.text
    for video in (run / "videos").glob("*.mp4"):
        video.unlink()
    (run / "videos").rename(run / "films")  # as earlier versions called it
    page = Page(build_report([run]))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 5
    assert all(value.startswith("data:image/png;base64,iVBOR") for value in pictures)


def test_without_videos_the_page_says_how_to_get_a_renderer(make_run: RunMaker) -> None:
    run = make_run()
    mend = "python -m llmdpd.evaluate RUN --videos && python -m llmdpd.report RUN"
    page = Page(build_report([run]))
    assert "libosmesa6" in page.text
    assert mend in page.text
    (run / "videos").mkdir()
    (run / "videos" / "README.txt").write_text("No renderer here: apt-get install <something>.")
    page = Page(build_report([run]))
    assert "No renderer here: apt-get install <something>." in page.text
    assert "libosmesa6" not in page.text
    assert mend in page.text


def test_the_page_loads_nothing_and_runs_nothing(make_run: RunMaker) -> None:
    for path in (build_report([make_run(videos=True)]), build_report([make_run("a"), make_run("b", seed=1)])):
        page = Page(path)
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
        values: dict[str, list[str]] = {}
        for _, name, value in page.attributes:
            values.setdefault(name, []).append(value)
        loading = [
            value for name in ("src", "href", "xlink:href", "srcset", "poster") for value in values.get(name, [])
        ]
        assert loading
        assert all(value.startswith(("data:", "#")) for value in loading)
        assert not [name for name in values if name.startswith("on")]
        assert not re.search(r"@import|url\((?!#)|https?://", path.read_text())
        assert any(value.startswith("default-src 'none';") for value in values["content"])
        assert len(values["id"]) == len(set(values["id"]))
        assert path.stat().st_size < 15_000_000


def test_hostile_names_and_prompts_stay_text(make_run: RunMaker, make_result: ResultMaker) -> None:
    evil = "</style><script>alert('x')</script><img src=//evil onerror=alert(1)> $\\frac{$ &amp; {{ 191*7 }} _"
    records = [make_result(task=evil, training_data=evil, trained_on=(evil,), context=evil, protocol=evil)]
    run = make_run("_run & <b>", records=records, config={evil: evil})
    (run / "prompts.json").write_text(json.dumps({evil: {"text": evil, "trajectory": {"source": evil}}}))
    (run / "meta.json").write_text(json.dumps({"versions": {evil: evil}, "command": evil, evil: evil}))
    (run / "videos").mkdir()
    (run / "videos" / "README.txt").write_text(evil)
    page = Page(build_report([run]))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert page.text.count(evil) >= 12
    assert "1337" not in page.text
    assert "Run _run & <b>" in page.text


@pytest.mark.parametrize("content", [None, b"", b"{broken", b"[1, 2]", b"\xff\xfe"])
def test_optional_files_missing_or_damaged_are_named(make_run: RunMaker, content: bytes | None) -> None:
    run = make_run()
    names = [path.name for path in run.iterdir() if path.name != "results.json"]
    assert sorted(names) == ["config.json", "meta.json", "metrics.jsonl", "prompts.json"]
    for name in names:
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
    page = Page(build_report([run]))
    for name in names:
        assert (name in page.texts["summary"]) == (name != "metrics.jsonl" or content != b"")
        assert (f"{name} is missing" in page.text) == (content is None)
    assert page.row("success", "coffee-push-v3")[0].startswith("76.0")
    assert "There are no learning curves" in page.text


def test_metrics_beyond_the_panels_are_named(make_run: RunMaker) -> None:
    run = make_run()
    many = {f"other/{index:02d}": index for index in range(14)}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i} | many) + "\n" for i in (1, 2)))
    text = " ".join(Page(build_report([run])).texts["curves"].split())
    assert "other/00" in text
    assert "Also recorded in metrics.jsonl: other/12, other/13." in text


def test_returns_have_their_own_table(page_of: PageMaker, make_locomotion: ResultMaker) -> None:
    page = page_of(records=[make_locomotion(), make_locomotion(checkpoint="best", normalised_score=51.26)])
    assert "success" not in page.tables
    last, best = page.row("returns", "hopper-v5"), page.row("returns", "hopper-v5", 1)
    assert last == ["last", "25", "1523.4 ± 210.9", "47.4", "own SAC replay, not D4RL", "105.9 ± 1.5", "101.3 ± 0.6"]
    assert best[:4] == ["best", "25", "1523.4 ± 210.9", "51.3"]
    assert "Normalised scores of the last checkpoint: 47.4 on hopper-v5." in page.text


def test_runs_that_differ_by_seed_are_averaged(make_run: RunMaker) -> None:
    runs = [make_run(f"s{seed}", seed=seed, shift=shift) for seed, shift in enumerate((0, 1, 4))]
    path = build_report(runs)
    assert path == runs[0].parent / "comparison.html"
    page = Page(path)
    rates = [100 * (24 - shift) / 25 for shift in (0, 1, 4)]
    expected = f"{mean(rates):.1f} ± {stdev(rates):.1f} seeds 96.0, 92.0, 80.0"
    assert page.row("success", "sweep-into-v3")[0] == expected
    by_seed = [mean([100 * (count - shift) / 25 for count in (24, 19, 22)]) for shift in (0, 1, 4)]
    assert page.row("success", "mean over tasks", 1)[0].startswith(f"{mean(by_seed):.1f} ± {stdev(by_seed):.1f} seeds")
    assert page.row("metadata", "seeds") == ["0, 1, 2"]
    assert "s0 and 2 more seeds" in page.text
    assert "Settings that differ" not in page.text


def test_episodes_that_the_tracker_ended_are_counted(
    make_run: RunMaker, make_records: Callable[..., list[TaskResult]]
) -> None:
    records = [
        dataclasses.replace(record, tracked=5 + place) if record.checkpoint == "best" else record
        for place, record in enumerate(make_records())
    ]
    page = Page(build_report([make_run("some", records=records)]))
    last, best = page.row("success", "sweep-into-v3")[:2]
    place = next(place for place, r in enumerate(records) if (r.task, r.checkpoint) == ("sweep-into-v3", "best"))
    assert best.endswith(f" {5 + place} handed over")
    assert "handed over" not in last
    split = records[place].split
    total = sum(record.tracked for record in records if record.split == split)
    mean_rows = [page.row("success", "mean over tasks", which)[1] for which in range(2)]
    assert any(row.endswith(f" {total} handed over") for row in mean_rows)
    assert "--track-after 0 evaluates the network alone" in page.text
    assert "handed over" not in Page(build_report([make_run("none")])).text.lower()


def test_runs_that_differ_otherwise_stand_side_by_side(make_run: RunMaker) -> None:
    runs = [make_run("pooled"), make_run("retrieval", shift=3, config={"context": "retrieval"})]
    page = Page(build_report(runs, runs[0].parent / "both.html"))
    assert heads(page, "coffee-push-v3") == ["76.0", "80.0", "64.0", "68.0", "76.56", "74.67"]
    assert "44.5 to 79.8 16/25" in page.row("success", "coffee-push-v3")[2]
    assert page.row("metadata", "context", 1) == ["not set", "retrieval"]


def test_where_a_run_lies_does_not_keep_seeds_apart(
    make_run: RunMaker, make_records: Callable[..., list[TaskResult]]
) -> None:
    runs = []
    for seed, folder in enumerate(("runs/s0", "/elsewhere/s1")):
        prompts = PromptUse(text="built in", trajectory=f"{folder}/prompt_data")
        records = make_records(seed, prompts=prompts)
        runs.append(make_run(f"s{seed}", seed=seed, records=records, config={"data": {"workers": seed, "seed": seed}}))
    assert Page(build_report(runs)).row("success", "sweep-into-v3")[0].endswith("seeds 96.0, 96.0")


def test_runs_of_the_same_seed_or_without_a_configuration_are_not_averaged(make_run: RunMaker) -> None:
    page = Page(build_report([make_run("first"), make_run("second", shift=2)]))
    assert heads(page, "sweep-into-v3")[:4] == ["96.0", "100.0", "88.0", "92.0"]
    assert "±" not in " ".join(page.row("success", "sweep-into-v3")[:4])
    runs = [make_run("third"), make_run("fourth", seed=1)]
    for run in runs:
        (run / "config.json").unlink()
    assert len(Page(build_report(runs)).row("success", "sweep-into-v3")) == 6


def test_missing_or_unusable_runs_are_named(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run()
    results = run / "results.json"
    for runs, out, named in (
        ([], None, "no run"),
        ([tmp_path / "nowhere"], None, "nowhere"),
        ([run, run / ".." / run.name], None, "twice"),
        ([run], tmp_path, "a folder"),
    ):
        with pytest.raises(InputError, match=named):
            build_report(runs, out)
    for content, named in (
        ('{"schema": 2, "records": []}', r"results\.json"),
        ('{"schema": 2, "records": [{}]}', r"records\[0\]"),
        (None, r"llmdpd\.evaluate"),
    ):
        results.unlink() if content is None else results.write_text(content)
        with pytest.raises(InputError, match=named) as caught:
            build_report([run])
        assert caught.value.path == str(results)
    assert not list(run.glob("*.html"))


def test_the_command_writes_the_page_or_says_what_is_wrong(
    make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    out = tmp_path / "deep" / "page.html"
    assert main([str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Page(out).row("success", "sweep-into-v3")[0].startswith("96.0")
    assert main([str(run), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no such run folder")
    assert str(tmp_path / "none") in error

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("llmdpd.reporting.page.atomic_write_text", full)
    assert main([str(run), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    for words in ("error: the system refuses", "No space left on device", "page.html"):
        assert words in error


def test_a_report_is_made_without_torch(make_run: RunMaker, tmp_path: Path) -> None:
    code = (
        "import sys; from llmdpd.cli.report import main; assert main(sys.argv[1:]) == 0; "
        "print({'torch', 'gymnasium', 'metaworld', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}", str(make_run())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "set()"


def test_the_same_runs_make_the_same_page(make_run: RunMaker, tmp_path: Path) -> None:
    run: Any = make_run(videos=True)
    first = build_report([run], tmp_path / "1.html").read_bytes()
    assert build_report([run], tmp_path / "2.html").read_bytes() == first


def test_of_many_tasks_the_figure_has_the_mean_and_the_table_each(make_run: RunMaker, make_result: ResultMaker) -> None:
    names = ML45_TRAIN[:14]
    records = [make_result(task=task, split="seen", successes=n) for n, task in enumerate(names)]
    path = build_report([make_run(records=[*records, make_result(task="box-close-v3", split="unseen")])])
    page = Page(path)
    figure = re.findall(r'<figure class="card" role="img" aria-label="([^"]*)"', path.read_text())[0]
    assert "mean of 14 tasks" in figure
    assert "box-close-v3" in figure
    assert not any(task in figure for task in names)
    assert all(page.row("success", task) for task in names)
