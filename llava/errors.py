"""Exceptions that callers can catch. Each message is one line: what was found, what was expected, what to do."""


class LlavaError(Exception):
    """Base class of all exceptions defined by this package. The CLI prints the message and exits with status 2.

    Messages may quote file contents, so unprintable characters are escaped and long messages are shortened. Advice that
    names an argument also names the option, as in "set template= (--template) to": the CLI prints only the option.
    """

    def __init__(self, message: str):
        line = printable(message)
        if len(line) > _MAX_LENGTH:
            line = f"{line[: _MAX_LENGTH // 2]} … {line[-_MAX_LENGTH // 2 :]}"
        super().__init__(line)


_MAX_LENGTH = 1200  # characters


def printable(text: str) -> str:
    """Returns a text in one line, with unprintable characters escaped, such as \\n for a line break."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(n: int, noun: str) -> str:
    """Returns "1 tensor" or "3,000 tensors"."""
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


class ConfigError(LlavaError):
    """A size or an option is missing, unknown, invalid or inconsistent with others."""


class CheckpointError(LlavaError):
    """A checkpoint file is missing or broken, or contains unexpected tensors."""


class MissingBaseError(CheckpointError):
    """A LoRA, projector or delta was opened without its base. The parts of the message let the CLI complete a command.

    problem: what is missing. path: the checkpoint. example: a base to pass. first: a command that creates this base, or
    "".
    """

    def __init__(self, problem: str, path: str, example: str, first: str):
        created = f", which is the result of: {first}" if first else ""
        super().__init__(f"{problem}; pass its folder or hub id as base= (--base), e.g. base={example!r}{created}")
        self.problem, self.path, self.example, self.first = problem, path, example, first


class ImageError(LlavaError):
    """An image cannot be read."""


class PromptError(LlavaError):
    """A prompt has messages, image placeholders or a length that the model does not accept."""


class ContextError(PromptError):
    """A prompt or a training sample has more tokens than the model's context."""


class DataError(LlavaError):
    """A training sample or its image is broken, or a data file is unreadable or in an unknown format."""
