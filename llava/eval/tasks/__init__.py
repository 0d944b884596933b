"""The benchmarks, one file each."""

from llava.errors import ConfigError
from llava.eval.task import Task
from llava.eval.tasks.llava_tiny import LlavaTiny
from llava.eval.tasks.pope import Pope

TASKS: dict[str, Task] = {task.name: task for task in (Pope(), LlavaTiny())}


def task_named(name: str) -> Task:
    """Returns a task. Raises ConfigError if there is none of this name."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r:.40}; choose from {', '.join(TASKS)}")
    return TASKS[name]
