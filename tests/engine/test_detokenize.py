"""Incremental detokenization: the pieces join to form the reply, and no part of a stop string is returned."""

import random
from pathlib import Path

import pytest

from llava.engine.detokenize import Detokenizer
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from tests import tiny

WORDS = ["The pier", " leads out", "\n", "  ", "café", "你好", "🙂🙃", "#", "###", " ok</s>", "用户", "1234", "\t", "ß"]


@pytest.fixture(scope="module", params=["spaces kept", "legacy", "added tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    added = ("<im_patch>", "<im_start>") if request.param == "added tokens" else ()
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(tiny.write_tokenizer(folder, legacy=request.param != "spaces kept", added=added))


def streamed(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], Detokenizer]:
    stream, pieces = Detokenizer(tokenizer.decode, stops), []
    for id in ids:
        pieces.append(stream.append(id))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("seed", range(8))
def test_pieces_join_to_what_the_ids_decode_to(tokenizer: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    ids = [chance.randrange(tokenizer.size) for _ in range(200)]
    if seed % 2:
        ids = [t.id for t in tokenizer.encode_tokens("".join(chance.choice(WORDS) for _ in range(120)))]
    pieces, stream = streamed(tokenizer, ids, [])
    assert "".join(pieces) == stream.text == tokenizer.decode(ids).strip()


@pytest.mark.parametrize("stop", ["#é", "用户:", "###", "🙂", "r leads", "pier\n"])
@pytest.mark.parametrize("head", ["abc", "a lake and # a", ""])
def test_no_part_of_a_stop_string_is_returned(tokenizer: Tokenizer, stop: str, head: str) -> None:
    ids = [token.id for token in tokenizer.encode_tokens(head + stop + " and more")]
    pieces, stream = streamed(tokenizer, ids, [stop])
    assert stream.stopped
    assert "".join(pieces) == head.strip()
    assert tokenizer.decode(stream.ids).strip() in head


def test_the_beginning_of_a_stop_string_is_returned_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [token.id for token in tokenizer.encode_tokens("one ## two #")]
    pieces, stream = streamed(tokenizer, ids, ["###"])
    assert ("".join(pieces), stream.stopped) == ("one ## two #", False)


def test_the_cost_of_a_token_does_not_grow_with_the_length(tokenizer: Tokenizer) -> None:
    """Measured in decoded ids, not in seconds."""
    decoded = 0

    def counted(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids)

    ids = [token.id for token in tokenizer.encode_tokens("The water is still, so the sky is seen twice. " * 60)]
    stream = Detokenizer(counted)  # type: ignore[arg-type]
    for id in ids:
        stream.append(id)
    assert decoded < 80 * len(ids)


def test_text_of_a_tokenizer_json_is_streamed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(tiny.TEXT.splitlines(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "".join(WORDS) * 6
    ids = tokenizer.encode(text)
    pieces, _ = streamed(tokenizer, ids, [])
    assert "".join(pieces) == text.strip()
    assert "".join(tokenizer.decode([id]) for id in ids if id < 128) != text  # some characters span several tokens


def test_a_continuation_keeps_the_white_space_that_a_reply_of_its_own_loses(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("Once upon a time, there was a cat.\n\nIt 猫 slept. ")
    for n in range(1, len(whole)):
        detokenizer = Detokenizer(tokenizer.decode, after=whole[max(0, n - 8) : n])
        pieces = [detokenizer.append(id) for id in whole[n:]] + [detokenizer.finish()]
        before = tokenizer.decode(whole[:n]).rstrip("\ufffd")
        assert before + "".join(pieces) == tokenizer.decode(whole)
        assert detokenizer.restarted(whole[n:]).text + "" == detokenizer.text.rstrip("\ufffd")
