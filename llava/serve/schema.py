"""The types of requests and responses, as OpenAI defines them.

Parameters that this server does not have are kept as extra fields, so that `check` can refuse those that would change
the result.
"""

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, FailFast, Field

from llava.serve.errors import MAX_NAME, ApiError
from llava.serve.limits import Limits

# parameters of OpenAI that are refused unless they have no effect: {name: values without effect, besides empty ones}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
}
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # labels, which never change a result
_UNLIMITED = 2**31
_EXPLAINED = 256  # tokens of an explained reply, unless another number is asked for

T = TypeVar("T")


class _OneError(FailFast):
    """Ends the validation of a list at its first error: a million of them would take gigabytes."""

    __hash__ = object.__hash__  # `typing` needs it for unions


_List = Annotated[list[T], _OneError()]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """A picture as a data URL. `detail` is accepted and ignored: the model decides how a picture is cut."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """A message of a conversation. `developer` is `system`."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[Part]


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted; nothing is obfuscated


class JsonSchema(BaseModel):
    """A JSON schema that the reply must match."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: str = "reply"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # accepted; the reply always matches


class ResponseFormat(_Strict):
    """Whether the reply is text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def check(self) -> None:
        """Raises ApiError if a schema is missing, or is given although the type does not use it."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", param="response_format")
        if self.type != "json_schema" and self.json_schema is not None:
            problem = f"json_schema is not used by the type {self.type}"
            expected = "set the type to json_schema, or leave json_schema out"
            raise ApiError(400, f"response_format: {problem}; {expected}", param="response_format")


class Sampling(BaseModel):
    """Parameters that chats and completions have in common."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="0 selects the most likely token; default: 1")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=_UNLIMITED, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | _List[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, float] | None = Field(None, description="{token id: from -100 to 100}")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted and ignored")

    def check(self, limits: Limits) -> None:
        """Raises ApiError for unknown parameters that would change the result, and for values beyond the limits."""
        for name, value in (self.model_extra or {}).items():
            if name not in _IGNORED and value not in _NEUTRAL.get(name, ()) and not _is_empty(value):
                name = name[:MAX_NAME]
                raise ApiError(400, f"the parameter {name!r} is not supported; leave it out", param=name)
        if (self.n or 1) > limits.n:
            raise ApiError(400, f"n is {self.n}; expected at most {limits.n}", param="n")
        stops = self.stops
        if len(stops) > limits.stops or any(not 0 < len(one) <= limits.stop_chars for one in stops):
            expected = f"at most {limits.stops} strings of 1 to {limits.stop_chars} characters"
            raise ApiError(400, f"stop: expected {expected}", param="stop")
        if len(self.logit_bias or {}) > limits.logit_bias:
            raise ApiError(400, f"logit_bias: expected at most {limits.logit_bias} tokens", param="logit_bias")
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is only for streams; set stream to true", param="stream_options")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: _List[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=_UNLIMITED, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, lt=_UNLIMITED, description="default: what the context holds")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if (self.top_logprobs or 0) > limits.top_logprobs:
            expected = f"at most {limits.top_logprobs}"
            raise ApiError(400, f"top_logprobs is {self.top_logprobs}; expected {expected}", param="top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs; set it to true", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            problem = "max_tokens and max_completion_tokens differ; give one of them"
            raise ApiError(400, problem, param="max_completion_tokens")
        if self.response_format:
            self.response_format.check()
        for message in self.messages:
            for name, value in (message.model_extra or {}).items():
                if name not in ("name",) and not _is_empty(value):
                    raise ApiError(
                        400, f"messages: the key {name[:MAX_NAME]!r} is not supported; leave it out", param="messages"
                    )

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of the reply, in tokens."""
        return self.max_completion_tokens or self.max_tokens or _UNLIMITED


class ExplainRequest(ChatRequest):
    """Body of POST /v1/explain: a chat, and which attention the maps show."""

    layers: _List[int] | None = Field(None, description="blocks, from 0, whose mean is shown; default: all")
    heads: _List[int] | None = Field(None, description="heads, from 0, whose mean is shown; default: all")
    rollout: bool | None = Field(None, description="follow the attention through these layers (arXiv:2005.00928)")

    def check(self, limits: Limits) -> None:
        super().check(limits)
        for name, wanted in (("n", self.n in (None, 1)), ("stream", not self.stream), ("logprobs", not self.logprobs)):
            if not wanted:
                raise ApiError(400, f"{name} is not supported for explanations; leave it out", param=name)

    @property
    def max_new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or _EXPLAINED


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]]
    max_tokens: int | None = Field(None, ge=0, lt=_UNLIMITED, description="default: 16")
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if (self.logprobs or 0) > limits.top_logprobs:
            expected = f"at most {limits.top_logprobs}"
            raise ApiError(400, f"logprobs is {self.logprobs}; expected {expected}", param="logprobs")
        if not 1 <= len(self.prompts) <= limits.prompts or not all(self.prompts):
            raise ApiError(400, f"prompt: expected 1 to {limits.prompts} prompts that are not empty", param="prompt")
        if self.stream and self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs cannot be streamed; leave stream out", param="stream")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        are_ids = bool(self.prompt) and all(isinstance(one, int) for one in self.prompt)
        return cast(list[list[int]], [self.prompt] if are_ids else self.prompt)


class TokenizeRequest(_Strict):
    """Body of POST /tokenize: a literal text, or a conversation. Image tokens are -200."""

    model: str | None = None
    prompt: str | None = None
    messages: _List[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = Field(True, description="whether a prompt gets the token that begins a text")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == 0 or (hasattr(value, "__len__") and len(value) == 0)
