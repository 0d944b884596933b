"""Says in our own words what is wrong with the body of a request."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from llava.serve.errors import MAX_NAME, ApiError

# by pydantic's type of error; names in braces are from its context
_EXPECTED = {
    "string_type": "a string",
    "string_unicode": "text without half of a surrogate pair",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "more entries",
    "too_long": "fewer entries",
    "literal_error": "{expected}",
    "union_tag_invalid": "a type of {expected_tags}",
    "union_tag_not_found": "an object with a type",
}


def to_api_error(error: RequestValidationError) -> ApiError:
    """Returns what a client is told: the first problem, by the name of the parameter."""
    first = _first(error.errors())
    kind, location = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    name = _name(location)
    if not name and kind == "string_unicode":
        return ApiError(400, "the body has a key with half of a surrogate pair; expected text")
    if not name:
        return ApiError(400, "the body is missing or no JSON object; expected an object with the request's parameters")
    if kind == "missing":
        return ApiError(400, f"{name} is missing", param=name)
    if kind == "extra_forbidden":
        return ApiError(400, f"the parameter {name!r} is not supported; leave it out", param=name)
    if location[0] == "prompt" and len(location) > 1:  # a union, of whose types the first one would be named
        return ApiError(400, "prompt: expected a string, token ids, or a list of either", param="prompt")
    expected = _EXPECTED.get(kind, "another value").format_map(_Context(first.get("ctx", {})))
    return ApiError(400, f"{name} is {_shown(first.get('input'))}; expected {expected}", param=name)


def _first(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the problem that is closest to the top or, of a value of several types, the one deepest within it."""
    first = min(errors, key=lambda one: len(one["loc"]))
    union = first["loc"][:-1]
    return max((one for one in errors if one["loc"][: len(union)] == union), key=lambda one: len(one["loc"]))


class _Context(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "another value"


def _name(location: Sequence[Any]) -> str:
    """Returns a path such as messages[0].content, without names of types, which are not in the body."""
    name, before = "", ("", "")
    for part in location:
        is_tag = before[0].startswith("list[tagged-union") and not isinstance(part, int)
        before = (before[1], str(part))
        if is_tag:
            continue
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.replace("_", "").isalnum() and part.islower() and part not in ("str", "int", "float", "bool", "list"):
            name += f".{part}" if name else part
    return name[:MAX_NAME]


def _shown(value: Any) -> str:
    """Returns a value in JSON, or its type if it is long."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = json.dumps(value)
    return text if len(text) <= 40 else "a long string" if isinstance(value, str) else "a long number"
