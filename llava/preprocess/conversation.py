"""Renders turns as prompt text, in the five styles of the original LLaVA code (conversation.py at c121f04).

Each span of the result records whether it is a training target, so labels need not be recovered from the text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from llava.config import IMAGE_PLACEHOLDER
from llava.errors import PromptError
from llava.preprocess import placeholders


class Style(Enum):
    """How turns are joined into a prompt."""

    SINGLE = "single"  # "role: text", with the same separator after every turn
    TWO = "two"  # "role: text", with one separator after user turns and another after assistant turns
    MPT = "mpt"  # ChatML: role, text and separator
    LLAMA_2 = "llama_2"  # [INST] text [/INST] answer
    PLAIN = "plain"  # no roles; used for stage 1 captions


class Span(NamedTuple):
    """A part of the prompt, and whether its tokens are training targets."""

    text: str
    target: bool = False


class Turn(NamedTuple):
    """One message. An assistant turn without text is the reply to be generated."""

    role: Literal["user", "assistant"]
    text: str | None


@dataclass(frozen=True, kw_only=True)
class Template:
    """One conversation format."""

    style: Style
    user: str
    assistant: str
    # `sep` ends the system text and each turn (in TWO, each user turn). In LLAMA_2, it separates exchanges.
    sep: str
    sep2: str = ""  # after assistant turns, if different from `sep`
    system: str = ""  # default system message
    system_role: str = ""  # prefix of the system message
    few_shot: tuple[Turn, ...] = ()  # example turns inserted before the conversation
    tagged: bool = False  # whether training encloses images in <Image> and </Image>

    def with_texts(self, change: Callable[[str], str]) -> "Template":
        """Returns the template with changed texts. `change` receives each of them."""
        return replace(
            self,
            user=change(self.user),
            assistant=change(self.assistant),
            sep=change(self.sep),
            sep2=change(self.sep2),
            system=change(self.system),
            system_role=change(self.system_role),
            few_shot=tuple(Turn(turn.role, change(turn.text or "")) for turn in self.few_shot),
        )

    @property
    def stop(self) -> str:
        """The string that ends a reply."""
        return self.sep2 or self.sep


def render(template: Template, turns: Sequence[Turn], system: str | None = None) -> list[Span]:
    """Renders turns as spans. Raises PromptError if the turns do not alternate or the template does not support them.

    As in the original code, only the role is rendered for a turn with empty text; LLAMA_2 skips such turns.
    """
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            raise PromptError(
                f"message {i + 1} is from the {turn.role}; "
                "expected alternating user and assistant messages, starting with the user"
            )
    system = template.system if system is None else system
    return list(_STYLES[template.style](template, [*template.few_shot, *turns], system))


def _role_and_colon(template: Template, turns: Sequence[Turn], system: str) -> Iterator[Span]:
    yield Span(system + template.sep)
    for role, text in turns:
        answer = role == "assistant"
        yield Span((template.assistant if answer else template.user) + ":")
        if text:
            yield Span(" " + text + ((answer and template.sep2) or template.sep), answer)


def _chatml(template: Template, turns: Sequence[Turn], system: str) -> Iterator[Span]:
    yield Span(template.system_role + system + template.sep)
    for role, text in turns:
        answer = role == "assistant"
        yield Span(template.assistant if answer else template.user)
        if text:
            yield Span(text + template.sep, answer)


def _llama_2(template: Template, turns: Sequence[Turn], system: str) -> Iterator[Span]:
    if turns and not turns[0].text:
        raise PromptError("the first message has no text, which this template does not support: add some text")
    for i, (role, text) in enumerate(turns):
        if not text:
            continue
        if role == "assistant":
            yield Span(f" {text} {template.sep2}", True)
            continue
        if i == 0 and system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        # no <s> before the first turn, because the tokenizer adds it
        yield Span((template.sep if i else "") + f"[INST] {text} [/INST]")


def _plain(template: Template, turns: Sequence[Turn], system: str) -> Iterator[Span]:
    """Renders the user's text or, if there is an answer (stage 1), only its image placeholders, then the answer."""
    if system or len(turns) > 2:
        raise PromptError(
            "the plain template supports one exchange and no system message: choose another template with template= "
            "(--template)"
        )
    user, answer = (*(turn.text for turn in turns), None)[:2]
    if answer:
        yield Span(IMAGE_PLACEHOLDER * placeholders.count(user or ""))
        yield Span(answer + template.sep, True)
    elif user:
        yield Span(user + template.sep)


_STYLES = {
    Style.SINGLE: _role_and_colon,
    Style.TWO: _role_and_colon,
    Style.MPT: _chatml,
    Style.LLAMA_2: _llama_2,
    Style.PLAIN: _plain,
}
