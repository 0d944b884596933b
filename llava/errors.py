"""Exceptions that callers can catch. Each message is one line: what was found, what was expected, what to do."""


class LlavaError(Exception):
    """Base class of all exceptions defined by this package. The CLI prints the message and exits with status 2.

    Messages may quote file contents, so unprintable characters are escaped and long messages are shortened.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        if len(line) > _MAX_LENGTH:
            line = f"{line[: _MAX_LENGTH // 2]} … {line[-_MAX_LENGTH // 2 :]}"
        super().__init__(line)


_MAX_LENGTH = 1200  # characters


def counted(n: int, noun: str) -> str:
    """Returns "1 tensor" or "3 tensors"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class ConfigError(LlavaError):
    """A size or an option is missing, unknown, invalid or inconsistent with others."""


class CheckpointError(LlavaError):
    """A checkpoint file is missing or broken, or contains unexpected tensors."""


class ImageError(LlavaError):
    """An image cannot be read."""


class PromptError(LlavaError):
    """A prompt has messages, image placeholders or a length that the model does not accept."""


class ContextError(PromptError):
    """A prompt or a training sample has more tokens than the model's context."""


class DataError(LlavaError):
    """A training sample or its image is broken, or a data file is unreadable or in an unknown format."""
