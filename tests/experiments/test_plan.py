"""From names and options to cells; whose folder is whose."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.config.parse import split_options
from llmdpd.config.presets import PRESETS
from llmdpd.errors import InputError
from llmdpd.experiments.cell import DECIDED, Cell, Evaluation, Share, Step
from llmdpd.experiments.grids import BUDGETS, FORMER_KEYS, GRIDS, Compared, Grid, Variant
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.utils.files import atomic_write_json
from llmdpd.utils.plain import differences, to_plain

MakePlan = Callable[..., Plan]
Finish = Callable[..., None]
ONE = Share(1)
COUNTS = {"reach-v3": 4, "push-v3": 2, "door-lock-v3": 1}


def step_of(cell: Cell, share: Share = ONE) -> Step:
    step = cell.next_step(share)
    assert step is not None
    return step


@pytest.mark.parametrize("name", GRIDS)
def test_every_experiment_has_a_plan(name: str, tmp_path: Path) -> None:
    grid = GRIDS[name]
    for protocol in grid.protocols:
        plan = make_plan(Settings(name, protocol, out=tmp_path / "out", data_root=tmp_path))
        assert all(len(cells) == 3 for cells in plan.cells.values())
        names = [cell.name for cells in plan.cells.values() for cell in cells]
        assert len(set(names)) == len(names)
        assert {cell.state for cells in plan.cells.values() for cell in cells} == {"missing"}
        for method in grid.methods:
            columns = {c for row in (grid.paper or {}).values() for c in row.columns}
            # Not every method of `baselines` is one of the paper's.
            missing = name == "baselines" and method.reported is None
            assert grid.paper is None or method.reported in columns or missing
    smallest = make_plan(Settings(name, out=tmp_path, budget="smoke", seeds=1))
    iterations = [cell.config.training.iterations for cells in smallest.cells.values() for cell in cells]
    assert max(iterations) == BUDGETS["smoke"].iterations


def test_a_plan_starts_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device auto` is tried out where a cell runs."""
    monkeypatch.setattr("llmdpd.config.schema.automatic_device", lambda: pytest.fail("CUDA is started"))
    assert make_plan(Settings("figure2", out=tmp_path, seeds=1)).runnable


def test_experiments_share_the_runs_that_are_the_same(tmp_path: Path) -> None:
    """In one folder a name is one configuration, whichever experiment made it."""
    known: dict[tuple[str, str], object] = {}
    for name, grid in GRIDS.items():
        for protocol in grid.protocols:
            plan = make_plan(Settings(name, protocol, out=tmp_path / protocol, data_root=tmp_path))
            for cell in (cells[0] for cells in plan.cells.values()):
                assert known.setdefault((protocol, cell.name), cell.config) == cell.config


def test_the_papers_own_method_is_one_run_for_both_tables(tmp_path: Path) -> None:
    table1, table3 = (make_plan(Settings(name, seeds=1, out=tmp_path)) for name in ("table1", "table3"))
    assert table1.cells["faithful"] == table3.cells["faithful"]
    labels = [method.label for method in table3.grid.methods]
    assert len(set(labels)) == len(labels), "each has a row of its own"


def test_a_protocol_names_the_tasks(tmp_path: Path) -> None:
    for protocol, seen, unseen in (
        ("paper", ("sweep-into-v3", "coffee-push-v3", "disassemble-v3"), None),
        ("ml45", ML45_TRAIN, ML45_TEST),
    ):
        tasks = make_plan(Settings("figure2", protocol, out=tmp_path)).cells["full"][0].config.tasks
        assert (tasks.protocol, tasks.seen) == (protocol, seen)
        assert unseen is None or tasks.unseen == unseen
    assert make_plan(Settings("figure2")).out == Path("experiments/paper")
    assert make_plan(Settings("figure2", "ml45", budget="hour")).out == Path("experiments/ml45-hour")


def test_a_budget_is_the_most_and_options_count_for_more(tmp_path: Path) -> None:
    most = BUDGETS["minutes"]
    plan = make_plan(Settings("table1", budget="minutes", out=tmp_path))
    for cells in plan.cells.values():
        config = cells[0].config
        assert config.training.iterations == most.iterations
        assert config.data.episodes == min(most.data_episodes or 0, PRESETS[cells[0].preset].data.episodes)
        assert cells[0].episodes == most.episodes
    own = Settings("table1", budget="minutes", out=tmp_path, episodes=7, options=("--training.iterations", "123456"))
    cell = make_plan(own).cells["full"][0]
    assert (cell.config.training.iterations, cell.episodes) == (123456, 7)
    less = Settings("table1", budget="minutes", out=tmp_path, options=("--training.iterations", "12"))
    assert make_plan(less).cells["full"][0].config.training.iterations == 12


@pytest.mark.parametrize(
    ("changes", "field", "hint"),
    [
        ({"experiment": "tabel1"}, "experiment", "table1"),
        ({"protocol": "ml44"}, "--protocol", "ml45"),
        ({"budget": "our"}, "--budget", "hour"),
        ({"only": ("no-promts",)}, "--only", "no-prompts"),
        ({"seeds": 0}, "--seeds", None),
        ({"episodes": 0}, "--episodes", None),
        ({"only": ("full",), "options": ("--method.gamma", "2")}, "method.gamma", None),
        ({"options": ("--training.iteration", "2")}, None, "lists the options"),
        ({"options": ("--method.alpha", "2")}, "--method.alpha", "--help"),
    ],
)
def test_wrong_settings_are_named(
    changes: dict[str, object], field: str | None, hint: str | None, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(dataclasses.replace(Settings("table3", out=tmp_path), **changes))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        *(("table3", (f"--{field.replace('_', '-')}", "1"), hint) for field, hint in DECIDED.items()),
        ("table3", ("--preset=smoke",), "--only"),
        ("table3", ("--run_dir", "here"), "--out"),
        ("table3", ("--evaluation.film-tasks", "3"), "llmdpd.evaluate"),
        # What a method stands for: by its options, by its preset, or for want of it.
        ("table3", ("--llm", "minilm"), "--only full no-prompts"),
        ("table3", ("--method.network.context.text",), "--only full olmo-1b no-trajectory"),
        ("table3", ("--method.acting.steps", "3"), "--only full olmo-1b"),
        ("table3", ("--method.critic-lr", "1e-4"), "--only full olmo-1b"),
        ("generalisation", ("--training.iterations", "9"), "--only full pooled"),
        ("reward", ("--data.noise", "clean"), "leave it out"),
        ("reward", ("--data", "folder"), "leave it out"),
        ("table1", ("--method.network.context.kind", "retrieval"), "--only full"),
    ],
)
def test_an_option_that_the_experiment_decides_is_refused(
    name: str, option: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(Settings(name, out=tmp_path, options=("--method.batch-size", "12", *option)))
    assert caught.value.field == option[0].split("=")[0]
    assert " ".join(option) in str(caught.value.found)
    assert hint in str(caught.value.hint)


def test_data_from_elsewhere_does_not_stand_for_a_collection(tmp_path: Path) -> None:
    for key in ("few-post-success-steps", "three-demonstrators"):
        with pytest.raises(InputError) as caught:
            make_plan(Settings("generalisation", only=(key,), out=tmp_path, options=("--data", "folder")))
        assert caught.value.field == "--data"
    make_plan(Settings("generalisation", only=("no-timestep-embedding",), out=tmp_path, options=("--data", "folder")))


def test_keys_that_methods_had_are_told_and_their_runs_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert FORMER_KEYS.keys().isdisjoint(method.key for grid in GRIDS.values() for method in grid.methods)
    (tmp_path / "no-clock-seed1").mkdir()
    plan = make_plan(Settings("generalisation", only=("no-clock", "no-turn"), out=tmp_path))
    assert plan.chosen == ("no-timestep-embedding", "no-rotation")
    said = capsys.readouterr().err
    assert said.startswith("--only no-clock is now --only no-timestep-embedding; the old spelling goes")
    assert said.count("\n") == 2
    folders = [cell.folder.name for cell in plan.cells["no-timestep-embedding"]]
    assert folders[:2] == ["no-timestep-embedding-seed0", "no-clock-seed1"]


def test_every_word_of_a_cells_own_is_refused_as_an_option(make_test_plan: MakePlan) -> None:
    cell = make_test_plan().cells["full"][0]
    _, *words = step_of(cell, Share(1, cuda=0)).words
    own = words[: -len(cell.options)]
    assert (*own, *cell.options) == tuple(words)
    assert {option.field for option in split_options(own)} <= DECIDED.keys()


def test_methods_that_were_not_asked_for_do_without_what_is_not_theirs_to_take(tmp_path: Path) -> None:
    options = ("--method.critic-lr", "1e-4", "--llm", "minilm", "--training.iterations", "77")
    cells = make_plan(Settings("table3", out=tmp_path, only=("full", "no-text"), options=options)).cells
    configs = {key: group[0].config for key, group in cells.items()}
    assert {config.training.iterations for config in configs.values()} == {77}
    assert [to_plain(configs[key].method)["critic_lr"] for key in ("full", "olmo-1b")] == [1e-4, 1e-4]
    assert configs["olmo-1b"].llm == "olmo-1b"
    assert "--method.critic-lr" not in cells["trajectory-diffusion"][0].options


@pytest.mark.parametrize("option", ["--method.alpha", "--td3-bc.alpha"])
def test_an_option_of_some_methods_is_for_those(option: str, tmp_path: Path) -> None:
    settings = Settings("baselines", only=("td3-bc", "rad", "bc"), out=tmp_path, options=(option, "1"))
    cells = make_plan(settings).cells
    assert {to_plain(cell.config.method)["alpha"] for key in ("td3-bc", "rad") for cell in cells[key]} == {1.0}
    assert option in cells["rad"][0].options
    assert option not in cells["bc"][0].options
    with pytest.raises(InputError, match=r"--only td3-bc rad s4rl"):
        make_plan(dataclasses.replace(settings, only=("bc", "dt")))


def test_options_need_to_fit_the_chosen_methods_alone(tmp_path: Path) -> None:
    """faithful's batch of 256 has no twelve equal shares, and its critics no chunks."""
    for option in (("--method.prompts-per-batch", "12"), ("--method.network.chunk", "4")):
        plan = make_plan(Settings("table1", out=tmp_path, only=("full",), options=option))
        assert option[0] in plan.cells["full"][0].options
        assert option[0] not in plan.cells["faithful"][0].options
        with pytest.raises(InputError):
            make_plan(Settings("table1", out=tmp_path, only=("full", "faithful"), options=option))


def test_a_model_without_weights_is_skipped_and_told(
    make_test_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish: Finish
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    grid = Grid(
        "", "", (Compared("olmo", "OLMo", "smoke", ("--llm", "olmo-1b")), Compared("own", "own", "smoke")), ("custom",)
    )
    plan = make_test_plan(grid)
    assert list(plan.skipped) == ["olmo"]
    assert "hf download allenai/OLMo-1B-hf" in plan.skipped["olmo"]
    assert [cell.name for cell in plan.runnable] == ["own-seed0", "own-seed1"]
    for cell in plan.cells["olmo"]:
        finish(cell, dict.fromkeys(COUNTS, 1))
    assert not make_test_plan(grid).skipped


def test_a_method_without_its_package_is_skipped_and_its_budget_fits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    plan = make_plan(Settings("baselines", out=tmp_path, budget="minutes"))
    assert "pip install" in plan.skipped["sac"]
    assert "cql" not in plan.skipped
    assert not [cell for cell in plan.runnable if cell.method == "sac"]
    cells = plan.cells
    assert "--data.episodes" in cells["cql"][0].options
    assert "--data.episodes" not in cells["sac"][0].options
    assert cells["sac"][0].config.training.iterations == BUDGETS["minutes"].iterations


def test_data_of_ones_own_is_for_those_that_learn_from_data(tmp_path: Path) -> None:
    settings = Settings("baselines", out=tmp_path, only=("cql", "sac"), options=("--data.path", "x"))
    with pytest.raises(InputError, match=r"for sac"):
        make_plan(settings)
    cells = make_plan(dataclasses.replace(settings, only=("cql",))).cells
    assert "--data.path" in cells["cql"][0].options
    assert "--data.path" not in cells["sac"][0].options


def test_first_seeds_come_first_and_only_chooses(make_test_plan: MakePlan) -> None:
    names = [cell.name for cell in make_test_plan().runnable]
    assert names == ["full-seed0", "plain-seed0", "full-seed1", "plain-seed1"]
    assert [cell.name for cell in make_test_plan(only=("plain",)).runnable] == ["plain-seed0", "plain-seed1"]


def test_the_state_of_a_cell(make_test_plan: MakePlan, finish: Finish) -> None:
    cell = make_test_plan().cells["full"][1]
    share = Share(3)
    first = step_of(cell, share)
    assert (cell.state, first.what) == ("missing", "train")
    assert first.words[:7] == (*("llmdpd.train", "--run-dir", str(cell.folder), "--preset", "smoke", "--seed", "1"),)
    assert first.words[first.words.index("--threads") + 1] == "3"
    config = RunFolder.create(cell.folder, cell.config)
    step = step_of(cell, share)
    assert (cell.state, step.what) == ("partial", "resume")
    assert step.words[:3] == ("llmdpd.train", "--resume", str(cell.folder))
    config.config.unlink()
    (cell.folder / "meta.json").unlink()
    finish(cell, COUNTS)
    assert (cell.state, cell.next_step(share)) == ("done", None)


def test_what_a_finished_cell_may_still_lack(make_test_plan: MakePlan, finish: Finish) -> None:
    cell = make_test_plan().cells["full"][0]
    finish(cell, COUNTS)
    for changes, options in (
        ({"episodes": 41}, "--episodes 41"),
        ({"seen_episodes": 41}, "--episodes 40 --seen-episodes 41"),  # never fewer than there are
        ({"episodes": 50, "seen_episodes": 5}, "--episodes 50 --seen-episodes 40"),
    ):
        words = step_of(dataclasses.replace(cell, **changes)).words  # type: ignore[arg-type]
        assert " ".join(words).startswith(f"llmdpd.evaluate {cell.folder} {options} ")
    assert dataclasses.replace(cell, episodes=40, seen_episodes=39).state == "done"
    (cell.folder / "report.html").unlink()
    assert step_of(cell).words == ("llmdpd.report", str(cell.folder))


def test_further_evaluations_have_files_by_their_options(make_test_plan: MakePlan, finish: Finish) -> None:
    own = Variant("noise", Evaluation("noise", ("--noise-scale", "0.5", "--prompt-data", "{data}/x")))
    once = Variant("once", Evaluation("once", ("--samples", "3")), once=True)
    plan = make_test_plan(Grid("", "", (Compared("full", "full", "smoke", variants=(own, once)),), ("custom",)))
    first, second = plan.cells["full"]
    assert [e.name for e in first.evaluations] == ["noise", "once"]
    assert [e.name for e in second.evaluations] == ["noise"]
    finish(second, COUNTS)
    step = step_of(second)
    file = own.evaluation.file(second.folder)
    assert step.words[:4] == ("llmdpd.evaluate", str(second.folder), "--out", str(file))
    assert step.words[-2:] == ("--prompt-data", f"{plan.settings.data_root}/x")
    file.parent.mkdir()
    file.write_bytes(second.run.results.read_bytes())
    assert second.state == "done"
    other = dataclasses.replace(second, evaluations=(Evaluation("noise", ("--noise-scale", "0.4")),))
    assert other.state == "partial"


@pytest.mark.parametrize(
    ("options", "evaluation", "field"),
    [
        (("--method.network.context.text-dropout", "0"), "no-text", "text"),
        (("--method.network.context.trajectory-dropout", "0"), "no-trajectory", "trajectory"),
        (("--tasks.unseen", "door-lock"), "swapped", "--prompts swapped"),
    ],
)
def test_options_that_a_further_evaluation_would_not_fit_are_refused_before_training(
    options: tuple[str, ...], evaluation: str, field: str, tmp_path: Path
) -> None:
    settings = Settings("generalisation", out=tmp_path, only=("full", "no-timestep-embedding"), options=options)
    with pytest.raises(
        InputError, match=rf"full could not be evaluated as the experiment does \({evaluation}\)"
    ) as caught:
        make_plan(settings)
    assert caught.value.field == field
    assert "--no-variants" in str(caught.value.hint)
    for changed in ({"variants": False}, {"only": ("no-timestep-embedding",)}):
        plan = make_plan(dataclasses.replace(settings, **changed))
        for key in ("full", "no-timestep-embedding"):
            assert differences(to_plain(plan.cells[key][0].config), to_plain(PRESETS["metaworld"]))


def test_a_run_of_another_configuration_is_told_and_left(make_test_plan: MakePlan, finish: Finish) -> None:
    cell = make_test_plan().cells["full"][0]
    finish(cell, COUNTS)
    value = json.loads(cell.run.config.read_text())
    value["method"]["lr"] = 0.5
    value["threads"] = 64  # decides nothing
    atomic_write_json(cell.run.config, value)
    with pytest.raises(InputError) as caught:
        _ = cell.state
    assert caught.value.path == str(cell.run.config)
    assert caught.value.found == "method.lr: 0.5 → 0.0006"
    value["method"]["lr"], value["device"] = 0.0006, "cuda"  # trained elsewhere
    atomic_write_json(cell.run.config, value)
    assert cell.state == "done"


def test_what_a_killed_creation_left_is_no_obstacle_to_a_cell(make_test_plan: MakePlan) -> None:
    cell = next(cell for cells in make_test_plan().cells.values() for cell in cells)
    cell.folder.mkdir(parents=True)
    for name in (".lock", "meta.json", ".config.json.0123abcd-1-0123abcd.tmp"):
        (cell.folder / name).write_text("{}")
    assert cell.state == "missing"
    assert step_of(cell).what == "train"
    (cell.folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        _ = cell.state


def test_something_else_in_a_cells_place_is_told_and_left(make_test_plan: MakePlan) -> None:
    cell = make_test_plan().cells["full"][0]
    cell.folder.mkdir(parents=True)
    assert cell.state == "missing"
    (cell.folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        _ = cell.state
    assert to_plain(cell.config)["preset"] == "smoke"


def test_each_environment_takes_data_of_its_own(tmp_path: Path) -> None:
    for name in ("hopper", "halfcheetah"):
        (tmp_path / f"{name}.hdf5").write_bytes(b"")
    settings = Settings("table2", out=tmp_path / "out", options=("--data.path", str(tmp_path / "{task}.hdf5")))
    cells = {key: group[0] for key, group in make_plan(settings).cells.items()}
    for key, name in (("hopper", "hopper"), ("diffusion-ql-hopper", "hopper"), ("halfcheetah", "halfcheetah")):
        assert cells[key].config.data.path == str(tmp_path / f"{name}.hdf5")
        assert str(tmp_path / f"{name}.hdf5") in cells[key].options


def test_a_run_that_was_evaluated_half_way_goes_on(make_test_plan: MakePlan, finish: Finish) -> None:
    cell = next(iter(make_test_plan().cells.values()))[0]
    finish(cell, COUNTS)
    assert cell.state == "done"
    records = json.loads(cell.run.results.read_text())
    for record in records["records"]:
        record["iterations"] = cell.config.training.iterations - 1
    cell.run.results.write_text(json.dumps(records))
    step = step_of(cell)
    assert step.what == "resume"


def test_folds_are_the_suites() -> None:
    protocols = [method.options[1] for method in GRIDS["folds"].methods]
    assert protocols == [name for name in PROTOCOLS if name.startswith("fold-")]
