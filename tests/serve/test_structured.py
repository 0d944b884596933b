"""Structured output: every reply that is not cut off matches its schema, which is checked here without llguidance."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving import Server, drawn, picture, text, user

ASKED = user("Give me JSON.")


def schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object of these properties, all of which are required, as OpenAI's strict mode asks."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": -5, "maximum": 120}
SCHEMAS: dict[str, dict[str, Any]] = {
    "one word": schema(colour={"enum": ["red", "blue", "dark green"]}),
    "numbers": schema(count=SMALL, share={"enum": [0.5, 1, -2.25]}, sure={"type": "boolean"}),
    "strings": schema(word=WORD, code={"type": "string", "pattern": "^[a-z]{2}-[0-9]{1,3}$"}),
    "lists": schema(few={"type": "array", "items": WORD, "minItems": 1, "maxItems": 2}),
    "nested": schema(inner=schema(count=SMALL, nothing={"type": "null"}), last={"const": "end"}),
    "one of": schema(either={"anyOf": [SMALL, {"enum": ["none"]}]}),
    "definition": {**schema(box={"$ref": "#/$defs/box"}), "$defs": {"box": schema(width=SMALL)}},
    "other characters": schema(**{"größe": {"enum": ["漢字", "klein\n", 'a "quote"']}}),
}


def conforms(value: Any, wanted: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value matches a schema of the few keywords above."""
    if "$ref" in wanted:
        return conforms(value, root["$defs"][wanted["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in wanted:
        return any(conforms(value, one, root) for one in wanted["anyOf"])
    if "enum" in wanted or "const" in wanted:
        return value in wanted.get("enum", [wanted.get("const")]) and not isinstance(value, bool)
    kind = wanted["type"]
    if kind == "object":
        return set(value) == set(wanted["properties"]) and all(
            conforms(value[name], one, root) for name, one in wanted["properties"].items()
        )
    if kind == "array":
        in_range = wanted["minItems"] <= len(value) <= wanted["maxItems"]
        return in_range and all(conforms(one, wanted["items"], root) for one in value)
    if kind == "string":
        return len(value) <= wanted.get("maxLength", 99) and bool(re.search(wanted.get("pattern", ""), value))
    if kind == "integer":
        return type(value) is int and wanted["minimum"] <= value <= wanted["maximum"]
    return {"boolean": isinstance(value, bool), "null": value is None}[kind]


def as_format(wanted: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": wanted, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize("wanted", SCHEMAS.values(), ids=SCHEMAS)
def test_replies_match_their_schema(server: Server, wanted: dict[str, Any], temperature: float):
    n = 1 if temperature == 0 else 3
    response = server.chat(
        ASKED, response_format=as_format(wanted), temperature=temperature, seed=1, n=n, max_tokens=300
    )
    for choice in response.choices:
        assert choice.finish_reason == "stop"
        assert conforms(json.loads(choice.message.content), wanted, wanted), choice.message.content


def test_a_json_object_is_one(server: Server):
    """Of several random replies, some end before the limit."""
    response = server.chat(
        ASKED, response_format={"type": "json_object"}, temperature=1, seed=3, n=8, max_tokens=150, top_p=0.9
    )
    whole = [one.message.content for one in response.choices if one.finish_reason == "stop"]
    assert whole
    assert all(isinstance(json.loads(one), dict) for one in whole)
    assert all(one.message.content.lstrip().startswith("{") for one in response.choices)


def test_a_reply_about_a_picture_matches_its_schema(server: Server):
    wanted = SCHEMAS["one word"]
    messages = user(picture(drawn("blue")), text("Which colour is it?"))
    content = server.chat(messages, response_format=as_format(wanted), max_tokens=100).choices[0].message.content
    assert conforms(json.loads(content), wanted, wanted)


def test_a_stream_matches_its_schema(server: Server):
    wanted = SCHEMAS["numbers"]
    chunks = server.chat(ASKED, response_format=as_format(wanted), max_tokens=300, stream=True)
    content = "".join(one.choices[0].delta.content or "" for one in chunks)
    assert conforms(json.loads(content), wanted, wanted)
    whole = server.chat(ASKED, response_format=as_format(wanted), max_tokens=300)
    assert whole.choices[0].message.content == content


def test_openai_parses_replies_into_its_models(server: Server):
    pydantic = pytest.importorskip("pydantic")
    reply_type = pydantic.create_model("Reply", sure=(bool, ...), word=(str, pydantic.Field(max_length=5)))
    response = server.client.chat.completions.parse(
        model=server.name, messages=ASKED, response_format=reply_type, max_tokens=200, temperature=0
    )
    assert isinstance(response.choices[0].message.parsed, reply_type)


def test_requests_with_and_without_a_schema_share_a_batch(server: Server):
    """Masks of one request are not those of another."""
    plain = server.chat(user("Hello"), max_tokens=12).choices[0].message.content
    body = {"model": server.name, "temperature": 0, "max_tokens": 200}
    formats = [None, *map(as_format, SCHEMAS.values())] * 2

    def ask(one: Any) -> str:
        more = {"response_format": one, "messages": ASKED} if one else {"messages": user("Hello"), "max_tokens": 12}
        return server.posted("/v1/chat/completions", **{**body, **more})["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(len(formats)) as threads:
        found = list(threads.map(ask, formats))
    for one, content in zip(formats, found, strict=True):
        if one is None:
            assert content == plain
        else:
            wanted = one["json_schema"]["schema"]
            assert conforms(json.loads(content), wanted, wanted)


@pytest.mark.parametrize("name", ["cats", "marked"])
def test_replies_of_adapters_match_their_schema(adapted: Server, name: str):
    """Also if their vocabulary has more tokens than the base."""
    wanted = SCHEMAS["nested"]
    response = adapted.chat(
        ASKED, model=name, response_format=as_format(wanted), temperature=1, seed=2, n=3, max_tokens=200
    )
    for choice in response.choices:
        assert conforms(json.loads(choice.message.content), wanted, wanted), choice.message.content


def test_text_is_the_default_format(server: Server):
    plain = server.chat(user("Hello"), max_tokens=4).choices[0].message.content
    assert (
        server.chat(user("Hello"), max_tokens=4, response_format={"type": "text"}).choices[0].message.content == plain
    )


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "foo"},
        {"type": "object", "properties": 5},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"enum": []},
        {"not": {"type": "string"}},
        {"type": "string", "pattern": "(?=a)b"},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_kept_is_refused(server: Server, wanted: dict[str, Any]):
    response = server.post("/v1/chat/completions", messages=ASKED, response_format=as_format(wanted), max_tokens=50)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert "schema" in error["message"]
    assert "llguidance" not in error["message"]


@pytest.mark.parametrize("kind", ["json_object", "text"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/explain"])
def test_a_schema_of_another_type_is_refused(server: Server, kind: str, path: str):
    """It would be ignored, or applied although the type says otherwise."""
    more: dict[str, Any] = {"messages": ASKED, "max_tokens": 4}
    response = server.post(path, response_format=as_format(SCHEMAS["one word"]) | {"type": kind}, **more)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert f"json_schema is not used by the type {kind}" in error["message"]
    server.posted(path, response_format={"type": kind, "json_schema": None}, **more)


def test_a_missing_schema_is_an_error(server: Server):
    response = server.post("/v1/chat/completions", messages=ASKED, response_format={"type": "json_schema"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"] == "response_format: json_schema is missing"
