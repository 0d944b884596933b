"""What a caller can get wrong. Each message says what was found, what was expected and what to do, in one line."""


class LlavaError(Exception):
    """The root of all errors that this package raises on purpose; the command line prints one line and exits 2.

    Messages quote foreign files: what can not be printed is escaped, and very long ones are cut in the middle.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}")


_LONGEST = 1200  # characters


class ConfigError(LlavaError):
    """A size or an option is missing, unknown or does not fit the others."""


class CheckpointError(LlavaError):
    """A file of a checkpoint is missing, broken, or holds other tensors than it should."""


class ImageError(LlavaError):
    """A picture cannot be read."""


class PromptError(LlavaError):
    """Messages, marks or a prompt's length do not fit the model."""


class DataError(LlavaError):
    """A training sample or its picture is broken, or a data file is not in a known format."""
