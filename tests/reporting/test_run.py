"""Reading metrics and films of a run folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.evaluation.videos import find_films, save_film
from llmdpd.reporting.run import read_run

RunMaker = Callable[..., Path]


def test_a_resumed_runs_repeated_iterations_count_once_and_last(make_run: RunMaker) -> None:
    run = make_run()
    entries = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 2.5), (3, 2.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, "loss/a": v}) + "\n" for i, v in entries))
    assert read_run(run, 0).curves == {"loss/a": [(1, 5.0), (2, 2.5), (3, 2.0)]}


def test_a_torn_line_and_values_that_are_no_numbers_are_left_out(make_run: RunMaker) -> None:
    run = make_run()
    lines = [
        '{"iteration": 1, "wall_seconds": 3, "a": 1, "b": NaN, "c": true, "d": "x", "e": [1], "f": Infinity}',
        '{"iteration": null, "a": 7}',
        '{"a": 9}',
        "[]",
        '{"iteration": 2, "a": 2}',
        '{"iteration": 3, "a',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    read = read_run(run, 0)
    assert read.curves == {"a": [(1, 1.0), (2, 2.0)]}
    assert [problem for problem in read.problems if "4 line(s)" in problem]


def frames(rng: np.random.Generator, count: int, shape: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]


def test_a_saved_film_is_found_with_its_sidecar(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    info = {"success": True, "seed": 5, "steps": 9, "checkpoint": "last"}
    written = save_film(tmp_path / "films", "reach-v3", frames(rng, 9, (49, 65)), info)
    assert {path.name for path in written} == {"reach-v3.png", "reach-v3.mp4"}
    problems: list[str] = []
    (film,) = find_films(tmp_path / "films", 10_000_000, problems)
    assert (film.task, film.is_video, film.info, problems) == ("reach-v3", True, info, [])
    data = base64.b64decode(film.data_uri.partition(",")[2])
    assert data == (tmp_path / "films" / "reach-v3.mp4").read_bytes()
    assert {path.suffix for path in (tmp_path / "films").iterdir()} == {".png", ".mp4", ".json"}


def test_a_strip_shows_the_first_and_the_last_frame(tmp_path: Path) -> None:
    import imageio.v3 as imageio

    episode = frames(np.random.default_rng(8), 31)
    save_film(tmp_path, "reach-v3", episode, {}, strip_frames=4)
    strip = imageio.imread(tmp_path / "reach-v3.png")
    assert strip.shape == (48, 4 * 64, 3)
    np.testing.assert_array_equal(strip[:, :64], episode[0])
    np.testing.assert_array_equal(strip[:, -64:], episode[-1])


def test_an_encoder_that_writes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio.v3 as imageio

    write = imageio.imwrite

    def silent(path: Path, image: np.ndarray, **options: object) -> None:
        if options["extension"] != ".mp4":
            write(path, image, extension=options["extension"])

    monkeypatch.setattr(imageio, "imwrite", silent)
    with pytest.raises(RuntimeError, match="no film of reach-v3"):
        save_film(tmp_path, "reach-v3", frames(np.random.default_rng(10), 3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["reach-v3.png"]


def test_frames_that_make_no_film_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    for bad in ([], frames(rng, 1) + frames(rng, 1, (48, 66)), [np.zeros((4, 4, 3))]):
        with pytest.raises(InputError, match="frames"):
            save_film(tmp_path, "reach-v3", bad, {})
    assert not list(tmp_path.iterdir())


def test_films_over_the_budget_give_way_to_strips_and_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftyp" + bytes(5000))
    (tmp_path / "a.png").write_bytes(b"\x89PNG" + bytes(500))
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x18ftyp" + bytes(9000))
    (tmp_path / "c.gif").write_bytes(b"GIF89a" + bytes(100))
    problems: list[str] = []
    films = find_films(tmp_path, 6000, problems)
    assert [(film.task, film.media_type) for film in films] == [("a", "image/png"), ("c", "image/gif")]
    assert problems == ["films/b.mp4 is too large for this page; open it in the run folder."]
    assert sum(len(film.data_uri) for film in films) < 6000 * 4 / 3


def test_films_stay_within_the_budget_together(tmp_path: Path) -> None:
    for task, size in (("a", 1900), ("b", 2900), ("c", 5000), ("d", 900)):
        (tmp_path / f"{task}.mp4").write_bytes(b"\0\0\0\x18ftyp" + bytes(size - 8))
    problems: list[str] = []
    # d takes 900 of its 1500; a does not fit a third of the rest, 1700, nor b a half; c gets all 5100 that is left.
    films = find_films(tmp_path, 6000, problems)
    assert [film.task for film in films] == ["c", "d"]
    assert len(problems) == 2


def test_a_file_that_is_no_film_and_a_broken_sidecar_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"\x89PNG rest")
    (tmp_path / "b.json").write_text("{")
    problems: list[str] = []
    (film,) = find_films(tmp_path, 1000, problems)
    assert (film.task, film.info) == ("b", {})
    assert len(problems) == 2
    assert problems[0].startswith("films/a.mp4")
    assert problems[1].startswith("films/b.json")
