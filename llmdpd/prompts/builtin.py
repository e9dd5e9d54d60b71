"""The text prompt that a task has without anybody writing one."""

from __future__ import annotations

from functools import lru_cache

from llmdpd.prompts.text import TextPrompt
from llmdpd.tasks.locomotion import is_locomotion, locomotion_id


@lru_cache(maxsize=128)
def task_prompt(task: str) -> TextPrompt:
    """Meta-World's tasks: in this project's words. Locomotion: from the environment's own documentation.

    Raises:
        InputError: neither.
    """
    if is_locomotion(task):
        from llmdpd.prompts.gymnasium_docs import environment_prompt

        return environment_prompt(locomotion_id(task))
    from llmdpd.prompts.metaworld import metaworld_prompt

    return metaworld_prompt(task)
