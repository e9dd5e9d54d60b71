"""Trackio, by its own library: on this machine, or where its environment variables (TRACKIO_SPACE_ID …) say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmdpd.training.loggers.base import PROJECT, Logger, configuration
from llmdpd.utils.extras import check_installed, extra


class Trackio(Logger):
    """A Trackio run, the same one after each resume. See `Logger`."""

    def __init__(self, run: Path, name: str, resume_at: int | None) -> None:
        with extra("trackio"):
            import trackio
        # It knows runs by their names alone; folders of the same name may be of different runs.
        self._run = trackio.init(
            project=PROJECT,
            name=f"{run.name}-{name}",
            config=configuration(run),
            resume="allow",
            embed=False,
        )

    @classmethod
    def require(cls) -> None:
        check_installed("trackio", field="training.logger")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self, failed: bool) -> None:
        self._run.finish()
