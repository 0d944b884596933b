"""Models, health, versions and tokens."""

import openai
import pytest

import llava
from tests.serving import Server, drawn, picture, text, user


def test_the_model_is_listed(server: Server):
    (model,) = server.client.models.list().data
    assert (model.id, model.object, model.owned_by) == (server.name, "model", "llava")
    assert model.max_model_len == 1024
    assert server.client.models.retrieve(server.name) == model


def test_adapters_are_listed_by_their_names(adapted: Server):
    assert [one.id for one in adapted.client.models.list().data] == [adapted.name, "cats"]
    assert adapted.client.models.retrieve("cats").max_model_len == adapted.vlm.config.decoder.max_seq


@pytest.mark.parametrize("name", ["nothing", "LLAVA-TINY", "a/b", "../../etc/passwd", "%2e%2e%2f", "ü", ""])
def test_an_unknown_model_is_not_found(server: Server, name: str):
    for path, more in (("chat/completions", {"messages": user("Hi")}), ("completions", {"prompt": "Hi"})):
        response = server.post(f"/v1/{path}", model=name, **more)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"
    assert server.post("/tokenize", model=name, prompt="a").status_code == 404
    assert server.http.get(f"/v1/models/{name}").status_code == 404


def test_openai_says_that_a_model_is_not_found(server: Server):
    with pytest.raises(openai.NotFoundError, match="the model 'nothing' does not exist") as caught:
        server.chat(user("Hi"), model="nothing")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nothing")


def test_a_ready_server_says_so(server: Server):
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/version").json() == {"version": llava.__version__}


@pytest.mark.parametrize("model", [None, "llava-tiny"])
def test_tokens_of_a_conversation_are_those_of_the_prompt(server: Server, model: str | None):
    messages = user(picture(drawn()), text("What is it?"))
    found = server.posted("/tokenize", messages=messages, model=model)
    assert found["count"] == len(found["tokens"]) == server.chat(messages, max_tokens=1).usage.prompt_tokens


def test_adapters_have_their_own_tokens(adapted: Server):
    found = adapted.posted("/tokenize", prompt="a boat", model="cats")
    assert found["tokens"] == adapted.prepared("a boat", "cats").ids.tolist()


def test_an_empty_text_has_only_bos(server: Server):
    assert server.posted("/tokenize", prompt="")["tokens"] == [1]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": user("a")}], ids=["neither", "both"])
def test_tokens_are_of_a_prompt_or_a_conversation(server: Server, body: dict[str, object]):
    response = server.post("/tokenize", **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "expected either prompt or messages"
