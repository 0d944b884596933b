"""The benchmarks, one file each."""

from llava.errors import ConfigError
from llava.eval.task import Task
from llava.eval.tasks.gqa import Gqa
from llava.eval.tasks.llava_bench import LlavaBenchCoco, LlavaBenchWild
from llava.eval.tasks.llava_tiny import LlavaTiny
from llava.eval.tasks.mm_vet import MmVet
from llava.eval.tasks.mmbench import MmBench
from llava.eval.tasks.mme import Mme
from llava.eval.tasks.perplexity import PerplexityOfTexts
from llava.eval.tasks.pope import Pope
from llava.eval.tasks.scienceqa import ScienceQa
from llava.eval.tasks.seed import Seed
from llava.eval.tasks.textvqa import TextVqa
from llava.eval.tasks.vizwiz import VizWiz
from llava.eval.tasks.vqav2 import Vqav2

_ALL: tuple[Task, ...] = (
    ScienceQa(), Pope(), Mme(), TextVqa(), Vqav2(), Gqa(), VizWiz(), MmBench(), Seed(), MmVet(),
    LlavaBenchWild(), LlavaBenchCoco(), PerplexityOfTexts(), LlavaTiny()
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_named(name: str) -> Task:
    """Returns a task. Raises ConfigError if there is none of this name."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r:.40}; choose from {', '.join(TASKS)}")
    return TASKS[name]
