"""Recording videos of a policy, or of a non-learned baseline, with maps of what its attention reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.evaluation.episodes import Index, MakeAct, act_maker
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.videos import save_video
from llmdpd.policy.policy import Policy
from llmdpd.tasks import EVALUATION_SEED_START
from llmdpd.tasks.names import file_stem
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest
from llmdpd.tasks.specs import suite_of, task_spec
from llmdpd.utils.files import atomic_write_text
from llmdpd.utils.progress import ProgressBar, console

STEPS_PER_FRAME = 4


_NONE_RENDERED = (
    "The environments of these tasks render no pictures: their class needs rgb_array among the render_modes of its "
    "metadata, and a render()."
)


def record_videos(
    policy: Policy | MakeAct,
    prompts: Mapping[str, TaskPrompt],
    folder: Path,
    *,
    max_steps: int | None,
    goal_visible: bool,
    seen: Sequence[str] = (),
    most: int | None = None,
    checkpoint: str = "last",
    check: Callable[[], None] = lambda: None,
) -> None:
    """Record one episode of each task into `folder`: TASK.mp4, a strip of frames TASK.png, and TASK.json beside them.

    For a policy that retrieves, attention/TASK.png shows which steps of its demonstration the recorded episode read
    (with action chunks, also what it would have read at the steps in between). Where no off-screen renderer works,
    the reason and how to get one are printed and written to README.txt there. With the policy and prompts of an
    evaluation, each is the task's first evaluated episode.

    seen, most: at most `most` tasks are recorded, those first that are not `seen`. `check` is called as episodes end
    and may raise to stop.
    """
    from llmdpd.tasks.simulation.render import rendering_backend

    folder.mkdir(parents=True, exist_ok=True)
    backend, reason = rendering_backend()
    if backend is None:
        atomic_write_text(folder / "README.txt", reason + "\n")
        console.print(f"no videos: {reason}")
        return
    shown = [task for task in prompts if suite_of(task).renders(task)]
    if len(shown) < len(prompts):
        console.print(f"no videos of environments that render none: {', '.join(sorted(set(prompts) - set(shown)))}")
    if not shown:
        atomic_write_text(folder / "README.txt", _NONE_RENDERED + "\n")
        return
    requests = [
        EpisodeRequest(
            *(task, EVALUATION_SEED_START, task_spec(task).steps(max_steps)), record=True, record_every=STEPS_PER_FRAME
        )
        for task in sorted(shown, key=lambda task: task in seen)[:most]
    ]
    with (
        ProgressBar("recording videos", "episodes", check=check) as bar,
        EnvPool(goal_visible=bool(goal_visible), parallel=len(requests), render=True) as pool,
    ):
        bar.update(0, len(requests))
        act = act_maker(policy)(prompts, requests)
        states: list[dict[int, NDArray[np.float32]]] = [{} for _ in requests]

        def watched(
            observations: NDArray[np.float32], index: Index, steps: Index, rewards: NDArray[np.float32]
        ) -> NDArray[np.float32]:
            for observation, request, step in zip(observations, index, steps, strict=True):
                states[request][int(step)] = observation.copy()
            return np.asarray(act(observations, index, steps, rewards), np.float32)

        results = pool.run(requests, watched, lambda done: bar.update(done, len(requests)))
    if isinstance(policy, Policy):
        for request, observed in zip(requests, states, strict=True):
            _map_attention(
                policy, prompts[request.task], observed, folder / "attention" / f"{file_stem(request.task)}.png"
            )
    for result in results:
        assert result.frames is not None
        task = result.request.task
        succeeds = task_spec(task).has_success
        outcome = {"success": result.success} if succeeds else {"return": round(result.episode_return, 1)}
        info = {**outcome, "seed": result.request.seed, "steps": result.length, "checkpoint": checkpoint}
        rate = suite_of(task).steps_per_second / STEPS_PER_FRAME
        save_video(folder, task, result.frames, info, frames_per_second=rate)
    console.print(f"videos: {folder}")


def _map_attention(policy: Policy, prompt: TaskPrompt, states: Mapping[int, NDArray[np.float32]], path: Path) -> None:
    if prompt.demonstration is None or prompt.text is None:
        return  # the attention is defined for both prompts together
    from llmdpd.evaluation.attention import save_attention

    observations = np.stack([states[step] for step in sorted(states)])
    found = policy.attention(prompt.text, prompt.demonstration, observations)
    if found is None:
        return
    path.parent.mkdir(exist_ok=True)
    save_attention(path, *found, f"{path.stem}: which steps of its demonstration the policy reads")
