"""A user's own tasks: a task file, its environments, and the task suite that they make.

`llmdpd.data.task_file.use_task_file` is how a command takes a file into use; worker processes get it as it was read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llmdpd.tasks import SUITES, USER

if TYPE_CHECKING:
    from llmdpd.tasks.user.file import TaskFile
    from llmdpd.tasks.user.suite import Read, UserSuite


def user_suite() -> UserSuite | None:
    """The suite of the task file in use, where there is one."""
    return cast("UserSuite", SUITES[USER]) if USER in SUITES else None


def file_in_use() -> TaskFile | None:
    """The task file in use, where there is one."""
    suite = user_suite()
    return None if suite is None else suite.file


def use_file(file: TaskFile, read: Read | None = None) -> UserSuite:
    """Make a file's tasks the process's, in place of those of another file; of the same one nothing changes.

    `read` learns from a task's data what neither the file nor an environment says; a worker process needs none.
    """
    from llmdpd.tasks.specs import task_spec
    from llmdpd.tasks.user.suite import UserSuite

    present = user_suite()
    if present is not None and present.file == file:
        return present
    suite = UserSuite(file, read)
    SUITES.register(USER, suite)
    task_spec.cache_clear()
    return suite
