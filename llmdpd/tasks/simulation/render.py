"""Rendering without a screen: which off-screen renderer works on this machine, and how to install one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from llmdpd.errors import InputError

BACKENDS = ("egl", "osmesa") if sys.platform.startswith("linux") else ("glfw",)
"""MuJoCo's off-screen renderers: on the GPU's driver, and in software; elsewhere the one that there is."""

_TRIAL_SECONDS = 60.0
_TRIAL = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/><light pos='0 0 4'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), "the picture is black"
"""
_ADVICE = "install one: `apt-get install libosmesa6` (software), or a GPU driver with EGL (`libegl1`)"


def _try(backend: str) -> str | None:
    """Render a picture in a separate process; returns None on success, otherwise the reason in one line."""
    # A process of its own: a failing GL library may abort, and mujoco reads MUJOCO_GL only when it is first imported.
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL],
            env={**os.environ, "MUJOCO_GL": backend},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no picture within {_TRIAL_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    # Clean-up errors of half-made contexts follow the first traceback; its last line is the cause.
    errors = [line for line in lines if line[:1].isalpha() and ("Error" in line.split(":")[0])]
    return errors[0] if errors else lines[-1] if lines else f"exit code {done.returncode}"


@functools.lru_cache(maxsize=8)
def _find(chosen: str | None) -> tuple[str | None, str]:
    reasons = []
    for backend in (chosen,) if chosen else BACKENDS:
        reason = _try(backend)
        if reason is None:
            return backend, f"{backend} works" + (" (chosen by MUJOCO_GL)" if chosen else "")
        reasons.append(f"{backend}: {reason}")
    if chosen:
        return None, f"MUJOCO_GL={chosen} does not work here ({reasons[0]}); unset it, or {_ADVICE}"
    return None, f"no off-screen renderer works here ({'; '.join(reasons)}); {_ADVICE}"


def rendering_backend() -> tuple[str | None, str]:
    """(the value of MUJOCO_GL that works here, a sentence), or (None, why none works and how to install one).

    If the environment variable MUJOCO_GL is set, only its value is tried. The first call takes a second or two.
    """
    return _find(os.environ.get("MUJOCO_GL") or None)


def require_backend() -> str:
    """The renderer that works here. Raises InputError, which says how to install one, where there is none."""
    backend, reason = rendering_backend()
    if backend is None:
        raise InputError("videos and pictures need an off-screen renderer", hint=reason)
    return backend
