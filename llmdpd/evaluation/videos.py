"""Videos of roll-outs in a run folder: TASK.mp4, a strip of frames TASK.png, and TASK.json, written and read here."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.errors import InputError
from llmdpd.tasks.names import file_stem
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_json, atomic_writer, read_json

# Preferred first: a video shows more than a strip of frames. With what a whole file has in its bytes 0 to 8.
_KINDS = {".mp4": ("video/mp4", b"ftyp"), ".png": ("image/png", b"\x89PNG")}


@dataclass(frozen=True)
class Video:
    """One roll-out: a video or a picture as a data URI, and what its sidecar says of the episode."""

    task: str
    media_type: str
    data_uri: str
    info: dict[str, Any]
    attention: str | None = None  # data URI of the attention map beside it

    @property
    def moves(self) -> bool:
        """Whether it is a video, and not a strip of frames."""
        return self.media_type.startswith("video/")


def find_videos(folder: Path, budget: int, problems: list[str]) -> tuple[Video, ...]:
    """Videos of a folder by task name, together at most `budget` bytes; what is left out is added to `problems`.

    Each task gets an equal share of what the smaller ones left: its video if it fits, else its strip of frames.
    """
    candidates: dict[str, list[Path]] = {}
    for suffix in _KINDS:
        for path in sorted(folder.glob(f"*{suffix}")):
            if _is_whole(path):
                candidates.setdefault(path.stem, []).append(path)
            else:
                problems.append(f"{folder.name}/{path.name} is not a whole {suffix[1:]} file and is left out.")
    videos = []
    by_size = sorted(candidates, key=lambda task: min(path.stat().st_size for path in candidates[task]))
    for index, task in enumerate(by_size):
        share = budget // (len(by_size) - index)
        chosen = next((path for path in candidates[task] if path.stat().st_size <= share), None)
        if chosen is None:
            name = f"{folder.name}/{candidates[task][0].name}"
            problems.append(f"{name} is too large for this page; open it in the run folder.")
            continue
        budget -= chosen.stat().st_size
        attention = folder / "attention" / f"{task}.png"
        shown = _data_uri(attention) if attention.is_file() and _is_whole(attention) else None
        info = _sidecar(chosen.with_suffix(".json"), problems)
        videos.append(Video(task, _KINDS[chosen.suffix][0], _data_uri(chosen), info, shown))
    return tuple(sorted(videos, key=lambda video: video.task))


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        return _KINDS[path.suffix][1] in file.read(8)


def _data_uri(path: Path) -> str:
    return f"data:{_KINDS[path.suffix][0]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _sidecar(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except InputError as error:
        problems.append(f"{path.parent.name}/{path.name} could not be read ({error.found}).")
        return {}
    return value if isinstance(value, dict) else {}


def save_video(
    folder: Path, task: str, frames: Sequence[np.ndarray], info: dict[str, Any], frames_per_second: float = 20
) -> None:
    """Write an episode's frames (uint8 [H, W, 3] each) as TASK.png, a strip of six, and TASK.mp4 where ffmpeg is there.

    `info` becomes the sidecar TASK.json: {success, seed, steps, checkpoint}.

    Raises:
        InputError: no frames, or frames that differ in shape.
        RuntimeError: ffmpeg wrote no video (it may fail without an exit status that imageio looks at).
    """
    if not frames or any(frame.shape != frames[0].shape or frame.dtype != np.uint8 for frame in frames):
        raise InputError(
            "frames cannot be made a video",
            found=f"{len(frames)} frames of {sorted({frame.shape for frame in frames})}",
            expected="at least one, uint8 [H, W, 3] and of one size",
        )
    with extra("report"):
        import imageio.v3 as imageio

    stem = file_stem(task)
    chosen = np.linspace(0, len(frames) - 1, min(6, len(frames))).round().astype(int)
    with atomic_writer(folder / f"{stem}.png") as temporary:
        imageio.imwrite(temporary, np.concatenate([frames[index] for index in chosen], axis=1), extension=".png")
    if _has_ffmpeg():
        # H.264 in 4:2:0 is what every browser plays; it needs even sides. The container is named to ffmpeg since
        # the temporary name does not end in .mp4.
        even = np.stack([frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames])
        options: dict[str, Any] = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-f", "mp4"]}
        with atomic_writer(folder / f"{stem}.mp4") as temporary:
            imageio.imwrite(temporary, even, extension=".mp4", plugin="FFMPEG", fps=frames_per_second, **options)
            if _KINDS[".mp4"][1] not in temporary.read_bytes()[:8]:
                raise RuntimeError(f"ffmpeg wrote no video of {task}; its own message stands above")
    atomic_write_json(folder / f"{stem}.json", info)


def _has_ffmpeg() -> bool:
    with contextlib.suppress(RuntimeError):
        with extra("report"):
            import imageio_ffmpeg

        return bool(imageio_ffmpeg.get_ffmpeg_exe())
    return False
