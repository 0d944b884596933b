"""Which role orders and system messages the templates accept in training."""

import pytest

from llava.errors import PromptError
from llava.preprocess.conversation import Style, Turn
from llava.preprocess.labels import training_spans
from llava.preprocess.templates import TEMPLATES

ROLES = {"h": "user", "g": "assistant"}


def turns(order: str) -> list[Turn]:
    return [Turn(ROLES[role], f"{role}{i}") for i, role in enumerate(order)]  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["hhg", "hgg", "hghh", "gghg"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_do_not_alternate_are_refused(name: str, order: str) -> None:
    with pytest.raises(PromptError):
        training_spans(TEMPLATES[name], turns(order))


@pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if one.style is Style.SINGLE])
def test_v0_trains_on_a_leading_answer_as_in_the_original(name: str) -> None:
    spans = training_spans(TEMPLATES[name], turns("ghg"))
    targets = "".join(span.text for span in spans if span.target)
    assistant = TEMPLATES[name].assistant
    assert targets == f"### {assistant}: g0\n###### {assistant}: g2\n### "


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_message_replaces_that_of_the_template(name: str) -> None:
    template = TEMPLATES[name]
    if template.style is Style.PLAIN:
        with pytest.raises(PromptError, match="no system message"):
            training_spans(template, turns("hg"), "Be brief.")
        return
    text = "".join(span.text for span in training_spans(template, turns("hg"), "Be brief."))
    assert (
        text
        == "".join(span.text for span in training_spans(template, turns("hg"))).replace(template.system, "Be brief.")
        or not template.system
    )
    assert "Be brief." in text
    assert not template.system or template.system not in text
