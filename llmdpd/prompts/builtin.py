"""The text prompt that a task has without anybody writing one."""

from __future__ import annotations

from functools import lru_cache

from llmdpd.prompts.text import TextPrompt
from llmdpd.tasks.locomotion import is_locomotion, locomotion_id
from llmdpd.tasks.specs import suite_of


@lru_cache(maxsize=128)
def task_prompt(task: str) -> TextPrompt:
    """The prompt of a Meta-World task; of locomotion, from Gymnasium's documentation; of others, as their suite says.

    Raises:
        InputError: no suite knows the task.
    """
    if is_locomotion(task):
        from llmdpd.prompts.gymnasium_docs import environment_prompt

        return environment_prompt(locomotion_id(task))
    suite = suite_of(task)
    if suite.name != "Meta-World":
        return TextPrompt.parse(suite.description(suite.canonical(task)))
    from llmdpd.prompts.metaworld import metaworld_prompt

    return metaworld_prompt(task)
