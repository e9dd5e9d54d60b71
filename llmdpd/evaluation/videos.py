"""Roll-out films of a run: RUN/films/<task>.mp4|gif|png with a sidecar <task>.json, written and read here."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_write_json, atomic_writer, read_json

# Preferred first: a film says more than a strip of frames.
_KINDS = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
_MAGIC = {".mp4": (b"ftyp", 4), ".gif": (b"GIF8", 0), ".png": (b"\x89PNG", 0)}


@dataclass(frozen=True)
class Film:
    """One roll-out: a film or a picture as a data URI, and what its sidecar says of the episode."""

    task: str
    media_type: str
    data_uri: str
    info: dict[str, Any]
    attention: str | None = None  # data URI of the attention map beside it

    @property
    def is_video(self) -> bool:
        return self.media_type.startswith("video/")


def find_films(folder: Path, budget: int, problems: list[str]) -> tuple[Film, ...]:
    """Films of a folder by task name, together at most `budget` bytes; what is left out is said in `problems`.

    Each task gets an equal share of what the smaller ones left: its film if it fits, else its strip of frames.
    """
    candidates: dict[str, list[Path]] = {}
    for suffix in _KINDS:
        for path in sorted(folder.glob(f"*{suffix}")):
            if _starts_as(path, suffix):
                candidates.setdefault(path.stem, []).append(path)
            else:
                problems.append(f"films/{path.name} is not a whole {suffix[1:]} file and is left out.")
    films = []
    by_size = sorted(candidates, key=lambda task: min(path.stat().st_size for path in candidates[task]))
    for index, task in enumerate(by_size):
        share = budget // (len(by_size) - index)
        chosen = next((path for path in candidates[task] if path.stat().st_size <= share), None)
        if chosen is None:
            problems.append(f"films/{candidates[task][0].name} is too large for this page; open it in the run folder.")
            continue
        data = chosen.read_bytes()
        budget -= len(data)
        kind = _KINDS[chosen.suffix]
        uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
        info = _sidecar(chosen.with_suffix(".json"), problems)
        films.append(Film(task, kind, uri, info, _attention(folder / "attention" / f"{task}.png")))
    return tuple(sorted(films, key=lambda film: film.task))


def _starts_as(path: Path, suffix: str) -> bool:
    magic, offset = _MAGIC[suffix]
    with path.open("rb") as file:
        return file.read(16)[offset : offset + len(magic)] == magic


def _attention(path: Path) -> str | None:
    if not (path.is_file() and _starts_as(path, ".png")):
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _sidecar(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except InputError as error:
        problems.append(f"films/{path.name} could not be read ({error.found}).")
        return {}
    return value if isinstance(value, dict) else {}


def save_film(
    folder: Path, task: str, frames: Sequence[np.ndarray], info: dict[str, Any], fps: int = 20, strip_frames: int = 6
) -> list[Path]:
    """Write an episode's frames (uint8 [H, W, 3] each) as <task>.png, a strip, and <task>.mp4 where ffmpeg is there.

    `info` becomes the sidecar <task>.json: {success, seed, steps, checkpoint}. Returns the files written. Raises
    `InputError` without frames, or if they differ in shape, and RuntimeError if ffmpeg writes no film (it may fail
    without an exit status that imageio looks at).
    """
    if not frames or any(frame.shape != frames[0].shape or frame.dtype != np.uint8 for frame in frames):
        raise InputError(
            "frames cannot be made a film",
            found=f"{len(frames)} frames of {sorted({frame.shape for frame in frames})}",
            expected="at least one, uint8 [H, W, 3] and of one size",
        )
    import imageio.v3 as imageio

    stem = re.sub(r"[^A-Za-z0-9._-]", "_", task)
    strip = folder / f"{stem}.png"
    chosen = np.linspace(0, len(frames) - 1, min(strip_frames, len(frames))).round().astype(int)
    with atomic_writer(strip) as temporary:
        imageio.imwrite(temporary, np.concatenate([frames[index] for index in chosen], axis=1), extension=".png")
    written = [strip]
    film = folder / f"{stem}.mp4"
    if _has_ffmpeg():
        # H.264 in 4:2:0 is what every browser plays; it needs even sides. The container is named to ffmpeg since
        # the temporary name does not end in .mp4.
        even = np.stack([frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames])
        options: dict[str, Any] = {
            "fps": fps,
            "codec": "libx264",
            "macro_block_size": 2,
            "output_params": ["-f", "mp4"],
        }
        with atomic_writer(film) as temporary:
            imageio.imwrite(temporary, even, extension=".mp4", plugin="FFMPEG", **options)
            if not _starts_as(temporary, ".mp4"):
                raise RuntimeError(f"ffmpeg wrote no film of {task}; what it said stands above")
        written.append(film)
    atomic_write_json(folder / f"{stem}.json", info)
    return written


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True
