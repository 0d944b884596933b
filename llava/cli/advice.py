"""Rewrites the advice in errors and warnings for the command line: options of the command instead of Python arguments.

Messages name an argument and its option as in "set template= (--template) to one of …".
"""

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llava.errors import LlavaError, MissingBaseError


@dataclass(frozen=True)
class Command:
    """The command that is running."""

    line: tuple[str, ...] = ()  # as it was typed, without the program's name; empty for a script
    options: frozenset[str] = frozenset()  # options that it accepts
    others: Mapping[str, frozenset[str]] = field(default_factory=dict)  # commands of the application -> their options

    @classmethod
    def running(cls, app: Any, line: list[str]) -> "Command":
        """app: the click group. line: the arguments, starting with the names of the command and its groups."""
        options = dict(_options(app, ()))
        names = [name for name in options if tuple(line[: len(name)]) == name]
        own = max(names, key=len, default=())
        return cls(tuple(line), options.get(own, frozenset()), {" ".join(name): o for name, o in options.items()})

    def render(self, error: LlavaError) -> str:
        """Returns the message of an error, with advice that works on the command line."""
        if isinstance(error, MissingBaseError):
            return f"{error.problem}; {self._with_base(error)}"
        return self.rewrite(str(error))

    def rewrite(self, text: str) -> str:
        """Replaces arguments and their options, as in "vision_tower= (--vision-tower)", with what the command takes."""
        found = re.sub(r"(\w+)=\S* \((--[\w-]+)( [^)]*)?\)", lambda match: self._option(*match.groups("")), text)
        return found.replace("set --set ", "pass --set ")

    def _option(self, argument: str, option: str, value: str) -> str:
        if option in self.options:
            return option + value
        if "--set" in self.options and _is_recipe_key(argument):
            return f"--set {argument}={value.strip() or '…'}"
        having = [f"llava {name}" for name, options in self.others.items() if option in options]
        return f"{option}{value} (an option of {', '.join(having)})" if having else option + value

    def _with_base(self, error: MissingBaseError) -> str:
        """Completes the command with the missing base or, if it has no option for it, says what to run before."""
        first = f"first run: {error.first}; then " if error.first else ""
        given = any(re.fullmatch(r"--(base|base-model-path|model-base)(=.*)?", word) for word in self.line)
        more = ["--base", error.example] if "--base" in self.options and not given else []
        if "--set" in self.options:
            more = ["--set", f"base={error.example}"]
        if more:
            return f"{first}run: {shlex.join(['llava', *self.line, *more])}"
        to = "llava" if "--delta" in self.options else "native"  # the only format that deltas can be made of
        convert = ["llava", "convert", error.path, "OUT", "--to", to, "--base", error.example]
        return f"{first}combine both with: {shlex.join(convert)}, and pass the folder OUT instead of {error.path}"


def _is_recipe_key(name: str) -> bool:
    from llava.train.recipe import Recipe

    return name in {field.name for field in fields(Recipe)}


def _options(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], frozenset[str]]]:
    """Yields the name and the options of each command, e.g. (("data", "check"), {"--images", …})."""
    for name, command in group.commands.items():
        own = (option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
        yield (*names, name), frozenset(option for option in own if option.startswith("-"))
        if hasattr(command, "commands"):
            yield from _options(command, (*names, name))


class AdviceFormatter(logging.Formatter):
    """Formats log records for stderr, with advice that works on the command line."""

    def __init__(self, command: Command):
        super().__init__("llava: %(message)s")
        self.command = command

    def format(self, record: logging.LogRecord) -> str:
        return self.command.rewrite(super().format(record))
