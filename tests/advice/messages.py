"""Finds the messages of the package that give advice, in its source code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import llava

PACKAGE = Path(llava.__file__).parent
_VERBS = (
    "add|choose|change|check|close|combine|convert|copy|correct|create|delete|download|escape|extract|fetch|fix|free|"
    "gather|give|increase|install|keep|leave|load|lower|merge|move|omit|open|pass|pipe|plot|put|quote|raise|reduce|"
    "remove|rename|repair|replace|resume|restore|rerun|run|save|scale|select|set|shorten|specify|split|start|stop|try|"
    "unpack|upgrade|use|wait|write|do not"
)
# An imperative at the start of a clause, an option, a command, or an argument with its option.
_ADVICE = re.compile(
    rf"(?:^|\{{\}}|[;:,(] |\b(?:or|and|then|first|so) )(?:{_VERBS})\b(?!,| is\b)"
    r"|--[a-z]|\bllava [a-z]+ |\bpip install|\w= \("
)
_DECLARATIONS = ("typer.Option", "typer.Argument", "typer.Typer", "re.compile")  # help texts and patterns


def messages_with_advice(package: Path = PACKAGE) -> dict[str, str]:
    """Every string in a package that gives advice, with {} for each inserted value -> its file."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        for text in _strings(ast.parse(file.read_text())):
            if " " in text and _ADVICE.search(text):
                found[text] = str(file.relative_to(package))
    return found


def _strings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _DECLARATIONS:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%\w|\{[^{}]*\}", "{}", node.value)
    elif isinstance(node, ast.JoinedStr):
        parts = node.values
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        for part in parts:
            if isinstance(part, ast.FormattedValue):
                yield from _strings(part.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _strings(child)


def pattern(message: str) -> re.Pattern[str]:
    """Matches a message as the command line or Python prints it."""
    text = re.sub(r"\w+=\S* \(--[^)]*\)", "{}", message.removeprefix("{}: "))  # the command line prints only the option
    return re.compile(".*".join(map(re.escape, text.split("{}"))))
