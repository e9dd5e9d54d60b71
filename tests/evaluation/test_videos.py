"""Videos written into a folder, and found again within a page's budget."""

from __future__ import annotations

import base64
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.evaluation.videos import find_videos, save_video

MP4, PNG = b"\0\0\0\x18ftyp", b"\x89PNG"


def frames(rng: np.random.Generator, count: int, shape: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]


def test_a_saved_video_is_found_with_its_sidecar(tmp_path: Path, rng: np.random.Generator) -> None:
    info = {"success": True, "seed": 5, "steps": 9, "checkpoint": "last"}
    save_video(tmp_path / "videos", "reach-v3", frames(rng, 9, (49, 65)), info)
    problems: list[str] = []
    (video,) = find_videos(tmp_path / "videos", 10_000_000, problems)
    assert (video.task, video.moves, video.info, problems) == ("reach-v3", True, info, [])
    data = base64.b64decode(video.data_uri.partition(",")[2])
    assert data == (tmp_path / "videos" / "reach-v3.mp4").read_bytes()
    assert {path.suffix for path in (tmp_path / "videos").iterdir()} == {".png", ".mp4", ".json"}


def test_a_strip_shows_the_first_and_the_last_frame(tmp_path: Path, rng: np.random.Generator) -> None:
    episode = frames(rng, 31)
    save_video(tmp_path, "reach-v3", episode, {})
    strip = imageio.imread(tmp_path / "reach-v3.png")
    assert strip.shape == (48, 6 * 64, 3)
    np.testing.assert_array_equal(strip[:, :64], episode[0])
    np.testing.assert_array_equal(strip[:, -64:], episode[-1])


def test_an_encoder_that_writes_nothing_is_an_error(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = imageio.imwrite

    def silent(path: Path, image: np.ndarray, **options: object) -> None:
        if options["extension"] != ".mp4":
            write(path, image, extension=options["extension"])

    monkeypatch.setattr(imageio, "imwrite", silent)
    with pytest.raises(RuntimeError, match="no video of reach-v3"):
        save_video(tmp_path, "reach-v3", frames(rng, 3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["reach-v3.png"]


def test_frames_that_make_no_video_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    for bad in ([], frames(rng, 1) + frames(rng, 1, (48, 66)), [np.zeros((4, 4, 3))]):
        with pytest.raises(InputError, match="frames"):
            save_video(tmp_path, "reach-v3", bad, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "found", "problems"),
    [
        # A strip stands in for a video that is too large, and a task without one is named.
        (
            {"a.mp4": MP4 + bytes(5000), "a.png": PNG + bytes(500), "b.mp4": MP4 + bytes(9000)},
            [("a", "image/png")],
            ["videos/b.mp4 is too large for this page; open it in the run folder."],
        ),
        # d takes 900 of its 1500; a does not fit a third of the rest, 1700, nor b a half; c gets all 5100 that is left.
        (
            {f"{task}.mp4": MP4 + bytes(size - 8) for task, size in zip("abcd", (1900, 2900, 5000, 900), strict=True)},
            [("c", "video/mp4"), ("d", "video/mp4")],
            [f"videos/{task}.mp4 is too large for this page; open it in the run folder." for task in "ab"],
        ),
        (
            {"a.mp4": b"", "b.png": PNG + b" rest", "b.json": b"{"},
            [("b", "image/png")],
            ["videos/a.mp4 is not a whole mp4 file and is left out.", "videos/b.json could not be read"],
        ),
    ],
)
def test_what_is_too_large_or_broken_is_left_out_and_named(
    tmp_path: Path, files: dict[str, bytes], found: list[tuple[str, str]], problems: list[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    said: list[str] = []
    videos = find_videos(folder, 6000, said)
    assert [(video.task, video.media_type) for video in videos] == found
    assert sum(len(video.data_uri) for video in videos) < 6000 * 4 / 3
    assert len(said) == len(problems)
    assert all(one.startswith(other) for one, other in zip(said, problems, strict=True))
