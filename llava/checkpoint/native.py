"""Our own layout: safetensors under our names, and one config.json that says all; and the conversion to any layout."""

from collections.abc import Mapping
from typing import Any

from llava.checkpoint.detect import FORMAT_KEY, NATIVE_FORMAT
from llava.config import LlavaConfig
from llava.errors import CheckpointError, ConfigError


def native_config(settings: Mapping[str, Any], where: str) -> LlavaConfig:
    """The config of a native folder. Raises CheckpointError on a format of a later version."""
    if settings[FORMAT_KEY] != NATIVE_FORMAT:
        raise CheckpointError(
            f"{where}/config.json: {FORMAT_KEY} is {settings[FORMAT_KEY]!r}, this version reads {NATIVE_FORMAT!r}: upgrade"
        )
    try:
        return LlavaConfig.from_dict({key: value for key, value in settings.items() if key != FORMAT_KEY})
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}/config.json: {error}") from None
