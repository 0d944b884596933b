"""The exceptions a caller can catch. Messages are one line: what was found, what was expected, what to do."""


class LlavaError(Exception):
    """Base class of all exceptions that this package raises on purpose. The CLI prints the message and exits with 2.

    Messages may quote the contents of files: unprintable characters are escaped, and long messages shortened.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        if len(line) > _MAX_LENGTH:
            line = f"{line[: _MAX_LENGTH // 2]} … {line[-_MAX_LENGTH // 2 :]}"
        super().__init__(line)


_MAX_LENGTH = 1200  # characters


class ConfigError(LlavaError):
    """A size or an option is missing, unknown or inconsistent with others."""


class CheckpointError(LlavaError):
    """A file of a checkpoint is missing, broken or has unexpected tensors."""


class ImageError(LlavaError):
    """An image cannot be read."""


class PromptError(LlavaError):
    """Messages, image marks or the length of a prompt do not fit the model."""


class DataError(LlavaError):
    """A training sample or its image is broken, or a data file is in an unknown format."""
