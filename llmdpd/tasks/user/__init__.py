"""A user's own tasks: a task file, its environments, and the task suite that they make.

`llmdpd.data.task_file.use_task_file` is how a command takes a file into use; worker processes get it as it was read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from llmdpd.tasks import SUITES, USER

if TYPE_CHECKING:
    from llmdpd.tasks.user.file import TaskFile
    from llmdpd.tasks.user.suite import Given, Read, UserSuite


def user_suite() -> UserSuite | None:
    """The suite of the task file in use, where there is one."""
    return cast("UserSuite", SUITES[USER]) if USER in SUITES else None


def file_in_use() -> TaskFile | None:
    """The task file in use, where there is one."""
    suite = user_suite()
    return None if suite is None else suite.file


def use_file(file: TaskFile, read: Read | None = None, given: Given | None = None) -> UserSuite:
    """Make a file's tasks the process's, in place of those of another file. Nothing is kept of an earlier use.

    Args:
        file: the task file.
        read: learns from a task's data what neither the file nor an environment says; a worker process needs none.
        given: stand in for the data that the file names, or does not.
    """
    from llmdpd.tasks.user.suite import NOTHING, UserSuite

    use_no_file()
    suite = UserSuite(file, read, given or NOTHING)
    SUITES.register(USER, suite)
    return suite


def use_no_file() -> None:
    """Forget the tasks of the file in use, where there is one, and the modules from its folder."""
    from llmdpd.tasks.user.modules import leave_folder

    SUITES.remove(USER)
    leave_folder()
