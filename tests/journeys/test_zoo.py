"""What is promised of loading and of the tools, seen from outside: commands, folders on disk, tensors in files.

Expected bits are computed here from the files alone; of the package only its commands and `llava.load` are used.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.cli import main
from tests import rows, tiny
from tests.command import run_well
from tests.tiny import PIECES

Tensors = dict[str, Tensor]
Entry = dict[str, Any]
MARKS = ("<im_patch>", "<im_start>", "<im_end>")
V11: dict[str, Any] = {"mm_projector_type": "linear", "mm_use_im_start_end": True, **tiny.LLAMA_1}
V0: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **V11}
QUESTION = "What is unusual about it?"


class Said:
    """What a command printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str, warnings: list[str]) -> None:
        self.code, self.out, self.err, self.warnings = code, out, err, warnings

    @property
    def lines(self) -> list[str]:
        """Lines for people on stderr."""
        return [line for line in self.err.splitlines() if line.strip()]


Command = Callable[..., Said]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`llava ARGS` in this process. Warnings, lines of stderr elsewhere, are in the hands of pytest."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*args: object, fails: bool = False) -> Said:
        capsys.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        said = Said(int(end.value.code or 0), *capsys.readouterr(), [record.getMessage() for record in caplog.records])
        assert (said.code != 0) == fails, said.err
        return said

    return call


def refused(said: Said, *mentions: str) -> str:
    """One line for people, exit code 2, with all of `mentions` in it."""
    assert said.code == 2
    assert len(said.lines) == 1, said.err
    for mention in mentions:
        assert mention in said.lines[0]
    return said.lines[0]


def stored(folder: Path) -> Tensors:
    """All tensors in a model's files, as their bytes are."""
    found: Tensors = {}
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        assert not set(part) & set(found)
        found |= part
    return found


def raw_bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, types and bytes."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert raw_bytes(found[name]) == raw_bytes(value), name


def without_rotary(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith("inv_freq")}


def summed(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> Tensors:
    """Section 7 of the specification: sums in float16, into the leading block; what the base lacks is absolute."""
    made = {}
    for name, value in without_rotary(delta).items():
        whole = value.half().clone()
        if name in base:
            rows, *columns = base[name].shape
            whole[:rows] = value.half()[:rows] + base[name].half()
            assert not columns or columns == list(value.shape[1:])
        made[name] = whole
    return made


def answer(vlm: llava.Assistant, picture: Path | None = None) -> list[int]:
    return vlm.generate(asked(picture), max_new_tokens=8).token_ids


def asked(picture: Path | None) -> list[dict[str, Any]]:
    text = {"type": "text", "text": QUESTION}
    return [{"role": "user", "content": [{"type": "image", "image": str(picture)}, text] if picture else [text]}]


def pixels(vlm: llava.Assistant, picture: Path) -> Tensor:
    given = vlm.prepare(asked(picture)).pixels
    assert given is not None
    return given


def opened(path: Path, **options: Any) -> llava.Assistant:
    return llava.load(path, dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that no test writes to."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def picture(place: Path) -> Path:
    file = place / "picture.png"
    made = Image.linear_gradient("L").resize((90, 40)).convert("RGB")
    made.save(file)
    return file


@pytest.fixture(scope="module")
def raw(place: Path) -> Path:
    """The raw LLaMA-1."""
    return tiny.write_llama(place / "raw", seed=7, **tiny.LLAMA_1)


@pytest.fixture(scope="module")
def delta(place: Path, clip: Path) -> Path:
    folder = tiny.write_delta(place / "delta", clip=clip, added=MARKS, **V11)
    tiny.write_tokenizer(folder, added=MARKS, legacy=None)
    return folder


@pytest.fixture(scope="module")
def vicuna(place: Path) -> Path:
    return tiny.write_llama(place / "vicuna", _name_or_path="lmsys/vicuna-13b-v1.3")


@pytest.fixture(scope="module")
def lora(place: Path, clip: Path) -> Path:
    return tiny.write_lora(place / "lora", clip=clip)


@pytest.fixture(scope="module")
def next_(place: Path, clip: Path) -> Path:
    """LLaVA-1.6: anyres, a tuned tower inside, bfloat16 in shards."""
    return tiny.write_llava(place / "next", layout="safetensors-shards", clip=clip, tower_seed=5, **tiny.ANYRES)


@pytest.fixture(scope="module")
def mpt(place: Path, clip: Path) -> Path:
    return tiny.write_mpt(place / "mpt", clip=clip)


# ------------------------------------------------------------------------------------------------------ apply-delta


@pytest.mark.parametrize(
    "flags", [("--base", "--target", "--delta"), ("--base-model-path", "--target-model-path", "--delta-path")]
)
def test_the_documented_line_makes_the_model(raw: Path, delta: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    argv = [sys.executable, "-m", "llava.model.apply_delta"]
    for flag, value in zip(flags, (raw, tmp_path / "T", delta), strict=True):
        argv += [flag, str(value)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(stored(tmp_path / "T"), summed(stored(raw), stored(delta)))
    assert [path.name for path in tmp_path.iterdir()] == ["T"]


@pytest.mark.parametrize("v0", [False, True])
def test_a_target_has_the_originals_layout(command: Command, raw: Path, clip: Path, tmp_path: Path, v0: bool) -> None:
    tokens = ("[PAD]", *MARKS) if v0 else MARKS  # 32004 rows as of the 7B v0, 32003 as of v1.1
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=tokens, **(V0 if v0 else V11))
    target = tmp_path / "T"
    target.mkdir()  # an empty one will do
    said = command("apply-delta", "--base", raw, "--target", target, "--delta", delta, "--shard-gb", "1e-4")
    found = stored(target)
    assert_same(found, summed(stored(raw), stored(delta)))
    assert len(found["lm_head.weight"]) == PIECES + len(tokens)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == sorted(path.name for path in target.glob("*.safetensors"))
    for file in files:
        assert {name for name, held in index["weight_map"].items() if held == file} == set(load_file(target / file))
        assert hashlib.sha256((target / file).read_bytes()).hexdigest() in said.out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (delta, target))
    assert {key for key in before if before[key] != after.get(key)} <= {"torch_dtype"}
    assert after["architectures"] == ["LlamaForCausalLM" if v0 else "LlavaLlamaForCausalLM"]
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (target / name).read_bytes() == (delta / name).read_bytes()
    assert not (tmp_path / "T.partial").exists()


def test_a_13b_v0_has_a_token_more_than_rows(raw: Path, clip: Path, tmp_path: Path, command: Command) -> None:
    delta = tiny.write_delta(tmp_path / "delta", clip=clip, added=MARKS, **V0)
    tiny.write_tokenizer(delta, added=(*MARKS, "[PAD]"), legacy=None, bos="</s>", pad="[PAD]", blank=True)
    on_the_way = opened(delta, base=raw)
    assert on_the_way.prepare(asked(None)).ids[0] == 2  # BOS of these tokenizer files is </s>
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", delta)
    assert len(stored(tmp_path / "T")["model.embed_tokens.weight"]) == PIECES + 3
    assert answer(opened(tmp_path / "T")) == answer(on_the_way)
    replies = on_the_way.generate_batch(["Once upon a time", "Red"], max_new_tokens=4)  # padded, and [PAD] has no row
    assert [len(reply.token_ids) for reply in replies] == [4, 4]


@pytest.mark.parametrize("kind", ["a file in it", "a file", "partial of somebody"])
def test_a_target_in_use_is_left_as_it_is(command: Command, raw: Path, delta: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "T"
    held = {"a file in it": target / "notes.txt", "a file": target}.get(kind, tmp_path / "T.partial" / "notes.txt")
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    said = command("apply-delta", "--base", raw, "--target", target, "--delta", delta, fails=True)
    refused(said, "T")
    assert held.read_text() == "mine"
    assert not list(tmp_path.rglob("*.safetensors"))


LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
LARGE |= {"num_key_value_heads": 8, "num_hidden_layers": 6, **tiny.LLAMA_1}


@pytest.fixture(scope="module")
def large(place: Path, clip: Path) -> tuple[Path, Path]:
    """A base and a delta that take long enough to be killed in the middle."""
    base = tiny.write_llama(place / "large", seed=7, **LARGE)
    config = tiny.llava_config(**LARGE, mm_projector_type="linear", mm_vision_tower=str(clip))
    under = tiny.llama_tensors(config, 7, inv_freq=True)
    apart = {name: value - under[name] for name, value in tiny.llama_tensors(config, 1, inv_freq=True).items()}
    apart |= tiny.projector_tensors(config, 1)
    folder = tiny.write_tokenizer(place / "large-delta")
    return base, tiny.write_model(folder, apart, "bin-shards", config)


def test_after_sigkill_the_same_line_goes_on(large: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    base, delta = large
    target, partial = tmp_path / "T", tmp_path / "T.partial"
    line = ["--base", base, "--target", target, "--delta", delta, "--shard-gb", "0.001"]
    argv = [sys.executable, "-m", "llava.model.apply_delta", *map(str, line)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 4 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    left = {path.name: path.stat() for path in partial.glob("*.safetensors")}
    assert len(left) >= 4
    other = tiny.write_llama(tmp_path / "other", seed=8, **LARGE)
    refused(command("apply-delta", *line, "--base", other, fails=True), "T.partial")  # nothing is mixed
    said = command("apply-delta", *line)
    assert not partial.exists()
    assert_same(stored(target), summed(stored(base), stored(delta)))
    after = {path.name: path.stat() for path in target.glob("*.safetensors")}
    kept = [name for name, was in left.items() if name in after and after[name].st_mtime_ns == was.st_mtime_ns]
    assert len(kept) >= len(left) - 1  # the one that was being written is written anew
    assert len(kept) < len(after)
    sums = (target / "SHA256SUMS").read_text().splitlines()
    assert {row.split()[-1] for row in sums} == set(after)
    for row in sums:
        assert hashlib.sha256((target / row.split()[-1]).read_bytes()).hexdigest() == row.split()[0]
        assert row.split()[0] in said.out


def test_verify_says_so_and_precise_sums_round_to_the_same_bits(
    command: Command, raw: Path, delta: Path, tmp_path: Path
) -> None:
    line = ["apply-delta", "--base", raw, "--delta", delta, "--verify"]
    assert "verified" in command(*line, "--target", tmp_path / "T").out
    command(*line, "--target", tmp_path / "P", "--precise")
    # a float32 has more than twice the bits of a float16 and two: rounding twice changes nothing
    assert_same(stored(tmp_path / "P"), stored(tmp_path / "T"))
    known = json.loads(command(*line, "--target", tmp_path / "J", "--json").out)
    assert isinstance(known, dict)


def test_metas_own_files_are_a_base_too(
    command: Command, raw: Path, delta: Path, tmp_path: Path, picture: Path
) -> None:
    meta = tiny.write_meta(tmp_path / "LLaMA" / "7B", shards=2, seed=7, **tiny.LLAMA_1)
    command("apply-delta", "--base", meta, "--target", tmp_path / "T", "--delta", delta)
    assert_same(stored(tmp_path / "T"), summed(stored(raw), stored(delta)))
    assert answer(opened(delta, base=meta), picture) == answer(opened(delta, base=raw), picture)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_of_another_type_is_summed_in_float16(command: Command, delta: Path, tmp_path: Path, dtype: str) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, torch_dtype=dtype, **tiny.LLAMA_1)
    command("apply-delta", "--base", base, "--target", tmp_path / "T", "--delta", delta)
    assert_same(stored(tmp_path / "T"), summed(stored(base), stored(delta)))


def test_a_delta_made_is_the_difference_and_gives_the_model_back(
    command: Command, raw: Path, clip: Path, tmp_path: Path
) -> None:
    model = tiny.write_llava(tmp_path / "model", clip=clip, added=MARKS, **V11)
    command("make-delta", "--base", raw, "--target", model, "--delta", tmp_path / "D")
    under, whole, found = stored(raw), without_rotary(stored(model)), without_rotary(stored(tmp_path / "D"))
    assert set(found) == set(whole)
    for name, value in found.items():
        expected = whole[name].half().clone()
        if name in under:
            expected[: len(under[name])] -= under[name].half()
        assert torch.equal(value, expected), name
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", tmp_path / "D")
    assert_same(stored(tmp_path / "T"), summed(under, found))
    assert answer(opened(tmp_path / "T")) == answer(opened(tmp_path / "D", base=raw))
    assert (tmp_path / "D" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()


def test_a_delta_is_applied_on_the_way_in_and_leaves_no_copy(
    command: Command, raw: Path, delta: Path, tmp_path: Path, picture: Path
) -> None:
    before = sorted(path for folder in (raw, delta) for path in folder.iterdir())
    pair = opened(delta, base=raw)
    command("apply-delta", "--base", raw, "--target", tmp_path / "T", "--delta", delta)
    whole = opened(tmp_path / "T")
    assert torch.equal(pair.logits(asked(picture)), whole.logits(asked(picture)))
    assert sorted(path for folder in (raw, delta) for path in folder.iterdir()) == before


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlavaLlamaForCausalLM"])
def test_architectures_as_published_or_upgraded(raw: Path, clip: Path, tmp_path: Path, architecture: str) -> None:
    upgraded = architecture.startswith("Llava")
    config = V0 | {"architectures": [architecture], "model_type": "llava" if upgraded else "llama"}
    delta = tiny.write_delta(tmp_path / "x", clip=clip, added=("[PAD]", *MARKS), **config)
    tiny.write_tokenizer(delta, added=("[PAD]", *MARKS), legacy=None, pad="[PAD]", blank=True)
    vlm = opened(delta, base=raw)
    prompt = vlm.prepare(asked(None)).prompt
    assert "###" in prompt  # llava_v0
    assert PIECES + 2 not in vlm.prepare(asked(None)).ids


def test_start_and_end_tokens_stand_around_a_picture_and_their_white_space_can_go(
    raw: Path, delta: Path, picture: Path
) -> None:
    start, end = PIECES + 1, PIECES + 2
    plain = opened(delta, base=raw).prepare(asked(picture)).token_ids
    place = plain.index(-200)
    assert plain[place - 1 : place + 2] == [start, -200, end]
    stripped = opened(delta, base=raw, legacy_strip=True).prepare(asked(picture)).token_ids
    assert len(stripped) < len(plain)
    assert 13 not in stripped[stripped.index(end) :][:3]


# ------------------------------------------------------------------------------------------------------- merge-lora


def pairs_of(lora: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the matrix: A and B, as stored."""
    bin_, safe = lora / "adapter_model.bin", lora / "adapter_model.safetensors"
    held = torch.load(bin_, weights_only=True) if bin_.exists() else load_file(safe)
    clean = {name[name.index("model.layers") :].replace(".default", ""): value for name, value in held.items()}
    return {
        name.replace(".lora_A", ""): (value, clean[name.replace("lora_A", "lora_B")])
        for name, value in clean.items()
        if ".lora_A." in name
    }


def merged(base: Path, lora: Path, *, precise: bool) -> Tensors:
    """peft on the CPU in float16: B @ A in float32, the product rounded, then a sum in float16. Or rounded once."""
    made = {name: value.half() for name, value in without_rotary(stored(base)).items()}
    settings = json.loads((lora / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    for name, (a, b) in pairs_of(lora).items():
        product = (b.float() @ a.float()) * scale
        made[name] = (made[name].float() + product).half() if precise else made[name] + product.half()
    for name, value in torch.load(lora / "non_lora_trainables.bin", weights_only=True).items():
        at = max(name.find("model.mm_projector"), name.find("model.embed_tokens"), name.find("lm_head"))
        made[name[at:]] = value.half()
    return made


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"form": "safetensors"},
        {"wrapper": "base_model.model.", "adapter": ".default"},
        {"wrapper": "base_model."},
        {"rows": True, "added": MARKS, "vocab_size": PIECES + 3, "mm_use_im_start_end": True},
    ],
    ids=["bin", "safetensors", "default", "short prefix", "June 2023"],
)
@pytest.mark.parametrize("precise", [False, True], ids=["as the original", "precise"])
def test_a_lora_is_merged(
    command: Command, vicuna: Path, clip: Path, tmp_path: Path, form: dict[str, Any], precise: bool
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip, **form)
    line = ["--base", vicuna, "--target", tmp_path / "T", "--lora", lora, *(["--precise"] if precise else [])]
    said = command("merge-lora", *line)
    expected = merged(vicuna, lora, precise=precise)
    found = stored(tmp_path / "T")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert hashlib.sha256((tmp_path / "T" / "model.safetensors").read_bytes()).hexdigest() in said.out
    assert not (tmp_path / "T.partial").exists()
    own, after = (json.loads((folder / "config.json").read_text()) for folder in (lora, tmp_path / "T"))
    assert all(after[key] == own[key] for key in ("vocab_size", "mm_projector_type", "rms_norm_eps"))
    tokenizer = lora if "added" in form else vicuna
    assert (tmp_path / "T" / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert (tmp_path / "T" / "added_tokens.json").exists() == ("added" in form)
    if precise:  # loading merges precisely, too
        torch.testing.assert_close(
            opened(tmp_path / "T").logits(asked(None)), opened(lora, base=vicuna).logits(asked(None)), atol=0.3, rtol=0
        )


def test_alpha_and_rank_are_read_from_the_folder(vicuna: Path, clip: Path, tmp_path: Path, command: Command) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    tiny.edit_json(lora / "adapter_config.json", lora_alpha=1)
    command("merge-lora", "--base", vicuna, "--target", tmp_path / "T", "--lora", lora)
    expected = merged(vicuna, lora, precise=False)
    assert_same(stored(tmp_path / "T"), expected)
    tiny.edit_json(lora / "adapter_config.json", lora_alpha=8)
    assert not torch.equal(
        merged(vicuna, lora, precise=False)["model.layers.0.mlp.up_proj.weight"],
        expected["model.layers.0.mlp.up_proj.weight"],
    )


@pytest.mark.parametrize("kind", ["a merged LLaVA", "Meta's files"])
def test_a_lora_goes_on_other_forms_of_its_base(
    command: Command, vicuna: Path, lora: Path, clip: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "a merged LLaVA":
        base = tiny.write_llava(tmp_path / "base", clip=clip)
    else:
        base = tiny.write_meta(tmp_path / "base" / "13B", shards=2)
    command("merge-lora", "--base", base, "--target", tmp_path / "T", "--lora", lora)
    assert_same(stored(tmp_path / "T"), merged(vicuna, lora, precise=False))


def test_an_empty_tensor_of_zero_3_is_refused_by_its_name(
    command: Command, vicuna: Path, clip: Path, tmp_path: Path
) -> None:
    lora = tiny.write_lora(tmp_path / "lora", clip=clip)
    held = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    name = next(name for name in held if name.endswith("mm_projector.0.weight"))
    torch.save(held | {name: torch.zeros(0)}, lora / "non_lora_trainables.bin")
    line = ("--base", vicuna, "--target", tmp_path / "T", "--lora", lora)
    refused(command("merge-lora", *line, fails=True), "mm_projector.0.weight")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    with pytest.raises(llava.LlavaError, match=r"mm_projector\.0\.weight"):
        opened(lora, base=vicuna)


# ---------------------------------------------------------------------------------------------- extract-projector


@pytest.mark.parametrize("kind", ["v1.5", "v1", "v1.6", "native", "delta"])
def test_a_projector_comes_out_as_it_was_and_goes_back(
    command: Command, clip: Path, raw: Path, delta: Path, next_: Path, tmp_path: Path, kind: str
) -> None:
    options: list[object] = []
    if kind == "v1.6":
        source = next_
    elif kind == "delta":
        source, options = delta, ["--base", raw]
    else:
        projector = "linear" if kind == "v1" else "mlp2x_gelu"
        source = tiny.write_llava(tmp_path / "source", clip=clip, mm_projector_type=projector)
    wanted = {name: value for name, value in stored(source).items() if "mm_projector" in name}
    if kind == "native":
        command("convert", source, tmp_path / "native", "--no-check")
        source = tmp_path / "native"
    command("extract-projector", source, tmp_path / "P", *options)
    found = torch.load(tmp_path / "P" / "mm_projector.bin", weights_only=True)
    kept = {name: value for name, value in found.items() if "mm_projector" in name}
    assert set(kept) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(kept[name].float(), value.float()), name
    if kind != "v1.5":
        return
    base = tmp_path / "llama"
    command("convert", source, base, "--to", "llama", "--no-check")
    text = "<image>\nA boat"
    pair, whole = (opened(path, **more) for path, more in ((tmp_path / "P", {"base": base}), (source, {})))
    image = Image.new("RGB", (70, 30), "red")
    assert torch.equal(pair.logits(text, images=[image]), whole.logits(text, images=[image]))


# ---------------------------------------------------------------------------------------------------------- convert


def back_and_forth(command: Command, source: Path, place: Path, by: str, end: str) -> Path:
    command("convert", source, place / "there", "--to", by, "--verify")
    report = (place / "there" / "conversion.md").read_text()
    assert "logits" in report.lower()
    command("convert", place / "there", place / "back", "--to", end, "--no-check")
    return place / "back"


def assert_back(source: Path, back: Path, clip: Path) -> None:
    """Every tensor of the source with its bytes; a tower that came in on the way is CLIP's."""
    found, expected = stored(back), without_rotary(stored(source))
    assert_same({name: value for name, value in found.items() if name in expected}, expected)
    theirs = torch.load(clip / "pytorch_model.bin", weights_only=True)
    for name in set(found) - set(expected):
        value = theirs[name[name.index("vision_tower.vision_model.") + len("vision_tower.") :]]
        assert torch.equal(found[name].float(), value.to(found[name].dtype).float()), name


@pytest.mark.parametrize("by", ["native", "hf", "original"])
@pytest.mark.parametrize("family", ["v1.5", "v1.6"])
def test_the_originals_layout_there_and_back(
    command: Command, clip: Path, next_: Path, tmp_path: Path, by: str, family: str
) -> None:
    source = next_ if family == "v1.6" else tiny.write_llava(tmp_path / "source", clip=clip)
    assert_back(source, back_and_forth(command, source, tmp_path, by, "original"), clip)


@pytest.mark.parametrize("by", ["native", "original"])
def test_an_mpt_there_and_back(command: Command, mpt: Path, clip: Path, tmp_path: Path, by: str) -> None:
    assert_back(mpt, back_and_forth(command, mpt, tmp_path, by, "original"), clip)


@pytest.mark.parametrize("by", ["native", "original"])
def test_a_v1_with_a_linear_projector_there_and_back(command: Command, clip: Path, tmp_path: Path, by: str) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip, added=MARKS, **V11)
    assert_back(source, back_and_forth(command, source, tmp_path, by, "original"), clip)


def test_grouped_heads_there_and_back(command: Command, clip: Path, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6}
    config = tiny.ANYRES | heads | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    source = tiny.write_llava(tmp_path / "x", layout="safetensors-shards", clip=clip, tower_seed=5, **config)
    back = back_and_forth(command, source, tmp_path, "hf", "original")
    assert_back(source, back, clip)
    kept = json.loads((back / "config.json").read_text())
    assert {key: kept[key] for key in heads} == heads
    assert opened(back).prepare(asked(None)).prompt == opened(source).prepare(asked(None)).prompt


def test_an_export_can_be_moved_and_needs_no_other_folder(command: Command, tmp_path: Path, picture: Path) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    source = tiny.write_llava(tmp_path / "x", layout="safetensors", clip=clip, tower_seed=5, **tiny.ANYRES)
    expected = opened(source).logits(asked(picture))
    for to in ("original", "native", "hf"):
        command("convert", source, tmp_path / "out", "--to", to, "--no-check")
        (tmp_path / "out").rename(tmp_path / f"moved-{to}")
    shutil.rmtree(clip)
    shutil.rmtree(source)
    for to in ("original", "native", "hf"):
        found = opened(tmp_path / f"moved-{to}", image_mode="original").logits(asked(picture))
        torch.testing.assert_close(found[:, :PIECES], expected, atol=1e-4, rtol=0)


def test_llava_hfs_layout_becomes_native_and_a_plain_llama(command: Command, next_: Path, tmp_path: Path) -> None:
    source = as_llava_hf(next_, tmp_path / "hf", new=False)
    command("convert", source, tmp_path / "llama", "--to", "llama", "--no-check")
    found, expected = stored(tmp_path / "llama"), stored(next_)
    assert set(found) == {name for name in expected if "layers." in name and "vision" not in name} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    for name, value in found.items():
        assert torch.equal(value[: len(expected[name])], expected[name]), name


@pytest.mark.parametrize("by", ["native", "llama"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_llama_there_and_back(command: Command, tmp_path: Path, by: str, dtype: str) -> None:
    source = tiny.write_llama(tmp_path / "source", torch_dtype=dtype)
    assert_same(stored(back_and_forth(command, source, tmp_path, by, "llama")), without_rotary(stored(source)))


def as_llava_hf(source: Path, folder: Path, *, new: bool) -> Path:
    """The layout of llava-hf by section 11 of the specification, with rows for `<image>`, `<pad>` and up to 64."""
    folder.mkdir()
    lm = "model.language_model." if new else "language_model.model."
    top = "model." if new else ""
    made = {}
    for name, value in without_rotary(stored(source)).items():
        if name == "lm_head.weight":
            key = name if new else f"language_model.{name}"
        elif "vision_tower" in name:
            key = top + name.removeprefix("model.vision_tower.")
        elif "mm_projector" in name:
            layer, part = name.split(".")[-2:]
            key = f"{top}multi_modal_projector.linear_{int(layer) // 2 + 1}.{part}"
        elif name == "model.image_newline":
            key = f"{top}image_newline"
        else:
            key = lm + name.removeprefix("model.")
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            value = torch.cat([value, tiny.tensor(9, name, (64, value.shape[1]), 0.02).to(value.dtype)])
        made[key] = value
    own = json.loads((source / "config.json").read_text())
    text = {key: own[key] for key in (*rows.KEYS, "max_position_embeddings", "rms_norm_eps", "torch_dtype")}
    text |= {"model_type": "llama", "vocab_size": PIECES + 64}
    vision = json.loads((Path(own["mm_vision_tower"]) / "config.json").read_text())["vision_config"]
    vision |= {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    vision |= {"intermediate_size": 128, "model_type": "clip_vision_model", "projection_dim": 32}
    next_ = "image_grid_pinpoints" in own
    config: dict[str, Any] = {
        "architectures": [f"Llava{'Next' if next_ else ''}ForConditionalGeneration"],
        "text_config": text,
    }
    config |= {"vision_config": vision, "model_type": "llava_next" if next_ else "llava", "ignore_index": -100}
    config |= {"image_token_index": PIECES, "pad_token_id": PIECES + 1, "projector_hidden_act": "gelu"}
    config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "bfloat16"}
    config |= {"tie_word_embeddings": False}
    if next_:
        pairs = [[high, wide] for wide, high in own["image_grid_pinpoints"]]
        config |= {"image_grid_pinpoints": pairs, "use_image_newline_parameter": True}
    tiny.save(made, folder, "safetensors-shards")
    tiny.write_json(folder / "config.json", config)
    shutil.copy(Path(own["mm_vision_tower"]) / "preprocessor_config.json", folder)
    tiny.write_tokenizer(folder, added=("<image>", "<pad>"), pad="<pad>")
    return folder


@pytest.mark.parametrize("new", [False, True], ids=["old keys", "new keys"])
@pytest.mark.parametrize("by", ["original", "native"])
def test_llava_hfs_layout_there_and_back(command: Command, next_: Path, tmp_path: Path, by: str, new: bool) -> None:
    source = as_llava_hf(next_, tmp_path / "hf", new=new)
    back = stored(back_and_forth(command, source, tmp_path, by, "hf"))
    expected = stored(source)

    def plain(tensors: Tensors) -> Tensors:
        """Names of both orders as one."""
        short = {}
        for name, value in tensors.items():
            key = name.removeprefix("model.").replace("language_model.model.", "language_model.")
            key = "lm_head.weight" if key.endswith("lm_head.weight") else key
            short[key] = value
        return short

    assert_same(plain(back), plain(expected))


@pytest.mark.parametrize("new", [False, True], ids=["old keys", "new keys"])
def test_llava_hfs_layout_answers_as_its_source_does(next_: Path, tmp_path: Path, picture: Path, new: bool) -> None:
    theirs = opened(as_llava_hf(next_, tmp_path / "hf", new=new), image_mode="original", template="llava_v1")
    ours = opened(next_)
    torch.testing.assert_close(
        theirs.logits(asked(picture))[:, :PIECES], ours.logits(asked(picture))[:, :PIECES], atol=1e-4, rtol=0
    )


def test_llava_hf_crops_unless_it_is_told_not_to(command: Command, clip: Path, tmp_path: Path, picture: Path) -> None:
    source = tiny.write_llava(tmp_path / "source", clip=clip, tower_seed=2)
    folder = as_llava_hf(source, tmp_path / "hf", new=False)
    cropped = pixels(opened(folder), picture)
    padded = pixels(opened(folder, image_mode="original"), picture)
    assert cropped.shape == padded.shape
    assert not torch.equal(cropped, padded)
    square = tmp_path / "square.png"
    Image.open(picture).crop((25, 0, 65, 40)).save(square)
    by_hand = pixels(opened(folder), square)
    assert (cropped - by_hand).abs().mean() < (padded - by_hand).abs().mean()


@pytest.mark.parametrize("form", ["original", "hf", "llama", "native", "gguf"])
def test_conversions_leave_nothing_behind_where_they_can_not_be_made(
    command: Command, mpt: Path, next_: Path, tmp_path: Path, form: str
) -> None:
    if form in ("hf", "llama"):
        said = command("convert", mpt, tmp_path / "out", "--to", form, fails=True)
        refused(said)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    refused(command("convert", next_, tmp_path / "used", "--to", form, fails=True), "used")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "notes.txt"]


def test_gguf_holds_the_same_bytes(command: Command, clip: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tiny.write_llava(tmp_path / "source", clip=clip)
    command("convert", source, tmp_path / "out", "--to", "gguf", "--no-check")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert [file.name.split("-")[0] for file in files] == ["mmproj", "model"]
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(files[1]).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    whole = stored(source)
    for i in range(2):
        for ours, theirs in names.items():
            block = "mlp" if "ffn" in theirs else "self_attn"
            value = whole[f"model.layers.{i}.{block}.{ours}.weight"]
            value = tiny.interleaved(value, 16) if ours in ("q_proj", "k_proj") else value
            assert held[f"blk.{i}.{theirs}.weight"].data.tobytes() == value.contiguous().numpy().tobytes()
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        assert held[f"{theirs}.weight"].data.tobytes() == whole[f"{ours}.weight"].numpy().tobytes()
    assert len(held) == 2 * 9 + 3
    assert (tmp_path / "out" / "conversion.md").is_file()


# -------------------------------------------------------------------------------------------------------------- zoo


def entries(shared: Path) -> list[Entry]:
    reference = json.loads((shared / "reference" / "zoo.json").read_text())
    return [*reference["entries"], *reference["extra_entries"]]


def test_zoo_lists_the_reference_cell_by_cell(command: Command, shared: Path) -> None:
    listed = json.loads(command("zoo", "--json").out)
    assert listed == entries(shared)
    assert all(next(iter(entry)) == "id" for entry in listed)
    packaged = Path(llava.__file__).parent / "checkpoint" / "zoo.json"
    assert json.loads(packaged.read_text()) == json.loads((shared / "reference" / "zoo.json").read_text())


def test_zoos_tables_show_every_row_with_its_cells(command: Command, shared: Path) -> None:
    lines = command("zoo").out.splitlines()
    for entry in entries(shared):
        row = next(line.split() for line in lines if line.split()[:1] == [entry["id"]])
        for source in entry.get("source_rows", []):
            if source["table"].startswith("seed"):
                for cell in source["cells"].values():
                    assert set(str(cell).split()) <= set(row), (entry["id"], cell)


@pytest.mark.parametrize(
    ("option", "text", "key"),
    [
        ("--base-llm", "Vicuna-13B-v1.3", "base_llm"),
        ("--format", "delta", "format"),
        ("--format", "projector", "format"),
        ("--format", "lora", "format"),
        ("--vision-encoder", "CLIP-L-336px", "vision_encoder"),
    ],
)
def test_zoo_is_filtered(command: Command, shared: Path, option: str, text: str, key: str) -> None:
    found = [entry["id"] for entry in json.loads(command("zoo", option, text, "--json").out)]
    assert found == [entry["id"] for entry in entries(shared) if text.lower() in str(entry.get(key)).lower()]
    shown = command("zoo", option, text).out
    assert all(id in shown for id in found)


def test_zoo_is_filtered_by_data(command: Command, shared: Path) -> None:
    found = {entry["id"] for entry in json.loads(command("zoo", "--data", "CC-595K", "--json").out)}
    assert found == {entry["id"] for entry in entries(shared) if entry.get("pretrain_data") == "CC-595K"}


def test_zoo_show_tells_all_of_every_row(command: Command, shared: Path) -> None:
    for entry in entries(shared):
        id = entry["id"]
        shown = command("zoo", "show", id).out
        words = set(shown.replace(",", " ").split())
        assert id in words
        for score in (entry.get("scores") or {}).values():
            assert str(score) in words, (id, score)
        if conversation := entry.get("conversation"):
            assert all(text in " ".join(shown.split()) for text in conversation.values() if text), id
        assert "image mode" in shown, id
        assert "licence" in shown.lower(), id
        if note := entry.get("license_note"):
            assert note in " ".join(shown.split()), id
        repo = id.split("#")[0]
        assert f"hf download {repo}" in shown, id
        known = json.loads(command("zoo", "show", id, "--json").out)
        assert {key: known[key] for key in entry} == entry
        purposes = {line["for"] for line in known["commands"]}
        assert {"fetch", "ask"} <= purposes, id
        assert ("merge" in purposes) == (entry["format"] in ("lora", "delta")), id
        if entry["format"] in ("lora", "delta", "projector"):
            base = [line["command"] for line in known["commands"] if "--base" in line["command"]]
            assert base, id
            assert known["needs"]["base"], id
        for line in known["commands"]:
            assert line["command"] in shown, (id, line)


def test_zoo_show_of_no_row_is_one_line(command: Command) -> None:
    refused(command("zoo", "show", "llava-v2-7b", fails=True), "llava-v2-7b")


def test_zoo_check_tells_a_row_by_its_files(command: Command, shared: Path, tmp_path: Path) -> None:
    names = ("llava-v1.5-13b-lora", "llava-v1.6-mistral-7b", "LLaVA-13b-delta-v1-1", "llava-v1.6-34b-hf")
    for name in names:
        entry = next(entry for entry in entries(shared) if entry["id"].endswith("/" + name))
        folder = rows.write_headers(tmp_path / f"x{len(name)}-mpt", entry)
        found = json.loads(command("zoo", "check", folder, "--json").out)
        assert [match["id"] for match in found["candidates"]] == [entry["id"]]
        shown = command("zoo", "check", folder).out
        assert entry["id"] in shown
        assert "config.json" in shown
        shutil.rmtree(folder)


def test_zoo_check_of_another_folder_names_the_nearest_and_what_differs(command: Command, next_: Path) -> None:
    shown = command("zoo", "check", next_).out
    assert "liuhaotian/llava-v1.6-vicuna-7b" in shown
    assert "width 64" in shown
    assert "4096" in shown


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_a_licence_note(command: Command, shared: Path, tmp_path: Path) -> None:
    for name in ("llava-v1.5-7b", "LLaVA-Lightning-MPT-7B-preview", "LLaVA-7b-delta-v0", "llava-v1.5-7b-lora"):
        entry = next(entry for entry in entries(shared) if entry["id"].endswith("/" + name))
        folder = rows.write_headers(tmp_path / f"x{len(name)}", entry)
        if not list(folder.glob("tokenizer*")):
            tiny.write_tokenizer(folder)
        shown = " ".join(command("inspect", folder).out.split())
        assert entry["license_note"] in shown, name
        shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_missing_base_is_named_with_the_command(
    command: Command, lora: Path, delta: Path, clip: Path, tmp_path: Path
) -> None:
    projector = tiny.write_projector(tmp_path / "p", clip=clip)
    for folder, base in ((lora, "lmsys/vicuna-13b-v1.3"), (projector, "lmsys/vicuna-7b-v1.3"), (delta, "llama-7b")):
        told = refused(command("ask", "Hi", "--model", folder, fails=True), base, f"--model {folder}", "llava ask ")
        assert told.split("--base ")[-1].split()[0].endswith(base if folder != delta else "b")
        refused(command("convert", folder, tmp_path / "out", fails=True), base, "--base")
        assert not (tmp_path / "out").exists()


OTHERS: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 32, "intermediate_size": 172},
    "layers": {"num_hidden_layers": 3},
    "mlp": {"intermediate_size": 128},
    "vocabulary": {"vocab_size": PIECES + 9},
    "key/value heads": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_a_base_that_can_not_fit_is_refused(
    command: Command, lora: Path, delta: Path, tmp_path: Path, what: str, kind: str
) -> None:
    base = tiny.write_llama(tmp_path / "base", seed=7, **{**tiny.LLAMA_1, **OTHERS[what]})
    folder, tool = {"lora": (lora, "merge-lora"), "delta": (delta, "apply-delta")}[kind]
    refused(command("ask", "Hi", "--model", folder, "--base", base, "--max-new-tokens", 1, fails=True), "base")
    line = (tool, "--base", base, "--target", tmp_path / "T", f"--{kind}", folder)
    refused(command(*line, fails=True), "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_base_of_another_architecture_is_refused(command: Command, lora: Path, delta: Path, tmp_path: Path) -> None:
    base = tiny.write_mpt(tmp_path / "mpt")
    for folder in (lora, delta):
        refused(command("ask", "Hi", "--model", folder, "--base", base, "--max-new-tokens", 1, fails=True), "mpt")


@pytest.mark.parametrize(
    "said_so",
    [
        {"_name_or_path": "lmsys/vicuna-7b-v1.1"},
        {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
        {"max_position_embeddings": 4096},
        {"rms_norm_eps": 1e-05},
    ],
    ids=["Vicuna", "Llama 2", "positions", "eps"],
)
def test_a_delta_is_kept_off_vicuna_and_llama_2_unless_forced(
    command: Command, delta: Path, tmp_path: Path, said_so: dict[str, Any]
) -> None:
    base = tiny.write_llama(tmp_path / "raw-llama-1", seed=7, **{**tiny.LLAMA_1, **said_so})
    line = ("apply-delta", "--base", base, "--target", tmp_path / "T", "--delta", delta)
    told = refused(command(*line, fails=True), "--force")
    assert str(next(iter(said_so.values()))) in told  # the evidence
    assert not list(tmp_path.glob("T*"))
    with pytest.raises(llava.LlavaError):
        opened(delta, base=base)
    forced = command(*line, "--force")
    assert_same(stored(tmp_path / "T"), summed(stored(base), stored(delta)))
    assert len(forced.warnings) == 1  # goes on, and says so
    assert forced.lines == []
    assert answer(opened(delta, base=base, force=True)) == answer(opened(tmp_path / "T"))


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_a_differing_recorded_name_is_one_line(
    command: Command, lora: Path, clip: Path, vicuna: Path, tmp_path: Path, kind: str
) -> None:
    folder = lora if kind == "lora" else tiny.write_projector(tmp_path / "p", clip=clip)
    other = tiny.write_llama(tmp_path / "vicuna-13b-v1.3", _name_or_path="lmsys/vicuna-13b-v1.5")
    line = ("ask", "Hi", "--model", folder, "--max-new-tokens", 1, "--base")
    said = command(*line, other)
    assert len(said.warnings) == 1
    assert "\n" not in said.warnings[0]
    assert "vicuna-13b-v1.5" in said.warnings[0]
    assert "v1.3" in said.warnings[0]
    if kind == "lora":
        assert command(*line, vicuna).warnings == []
        done = run_well("merge-lora", "--base", other, "--target", tmp_path / "T", "--lora", lora)
        assert len(done.stderr.splitlines()) == 1
        assert "vicuna-13b-v1.5" in done.stderr


# ------------------------------------------------------------------------------------------------------------ names

NONSENSE = ("llava-mpt-7b-lora-delta-v0", "llama-2-13b-chat.partial", "clip mm_projector.bin")


@pytest.mark.parametrize("name", NONSENSE)
def test_names_of_folders_decide_nothing(
    clip: Path, raw: Path, delta: Path, lora: Path, vicuna: Path, mpt: Path, tmp_path: Path, picture: Path, name: str
) -> None:
    merged_ = tiny.write_llava(tmp_path / "m", clip=clip)
    for i, (folder, base) in enumerate(((merged_, None), (delta, raw), (lora, vicuna), (mpt, None))):
        under = {"base": base} if base else {}
        right = opened(folder, **under)
        there = tmp_path / str(i) / name
        there.parent.mkdir()
        there.symlink_to(folder)
        if base:
            (tmp_path / f"b{i}").mkdir()
            under = {"base": (tmp_path / f"b{i}" / "vicuna-llama-2-llava").absolute()}
            under["base"].symlink_to(base)
        other = opened(there, **under)
        first, second = right.prepare(asked(picture)), other.prepare(asked(picture))
        assert first.prompt == second.prompt
        assert torch.equal(right.logits(asked(picture)), other.logits(asked(picture)))


@pytest.mark.parametrize("name", ["x#y", "a b", "x\ny", "model.safetensors", "[red]%s{}", "name=value"])
def test_odd_names_are_names(
    command: Command, vicuna: Path, lora: Path, raw: Path, delta: Path, tmp_path: Path, name: str
) -> None:
    places = {}
    for kind, folder in (("base", vicuna), ("lora", lora), ("raw", raw), ("delta", delta)):
        places[kind] = tmp_path / kind / name
        shutil.copytree(folder, places[kind])
    line = ("--max-new-tokens", 2)
    command("ask", "Hi", "--model", places["lora"], "--base", places["base"], *line)
    command("ask", "Hi", "--model", places["base"], "--adapter", f"one={places['lora']}", *line)
    command("merge-lora", "--base", places["base"], "--target", tmp_path / name, "--lora", places["lora"])
    assert_same(stored(tmp_path / name), merged(vicuna, lora, precise=False))
    command("convert", tmp_path / name, tmp_path / f"{name}-hf", "--to", "hf", "--no-check")
    command("inspect", tmp_path / f"{name}-hf")
    command("apply-delta", "--base", places["raw"], "--target", tmp_path / f"{name}-sum", "--delta", places["delta"])
    assert_same(stored(tmp_path / f"{name}-sum"), summed(stored(raw), stored(delta)))


# --------------------------------------------------------------------------------------------------------- adapters


def test_loras_are_kept_apart_and_switched(vicuna: Path, lora: Path, clip: Path, tmp_path: Path, picture: Path) -> None:
    second = tiny.write_lora(tmp_path / "second", clip=clip, seed=9, mm_projector_type="linear")
    vlm = opened(vicuna, adapters={"one": lora, "two": second})
    assert vlm.adapters == ["one", "two"]
    bare = opened(vicuna).logits("Once upon a time")
    for name, folder in (("two", second), ("one", lora), ("two", second)):
        vlm.adapter(name)
        assert vlm.active == name
        alone = opened(folder, base=vicuna)
        torch.testing.assert_close(vlm.logits(asked(picture)), alone.logits(asked(picture)), atol=1e-3, rtol=0)
    vlm.adapter(None)
    assert vlm.active is None
    assert torch.equal(vlm.logits("Once upon a time"), bare)
    with pytest.raises(llava.LlavaError, match="three"):
        vlm.adapter("three")


def test_a_lora_with_its_own_rows_and_one_alone_are_kept_apart_too(
    vicuna: Path, lora: Path, clip: Path, tmp_path: Path, picture: Path
) -> None:
    config: dict[str, Any] = {"vocab_size": PIECES + 3, "mm_use_im_start_end": True}
    june = tiny.write_lora(tmp_path / "june", clip=clip, seed=8, rows=True, added=MARKS, **config)
    vlm = opened(vicuna, adapters={"june": june, "one": lora})
    assert vlm.active == "june"  # the first
    for name, folder, rows_ in (("june", june, PIECES + 3), ("one", lora, PIECES), ("june", june, PIECES + 3)):
        vlm.adapter(name)
        found, expected = vlm.logits(asked(picture)), opened(folder, base=vicuna).logits(asked(picture))
        assert found.shape[1] == rows_
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    apart = opened(lora, base=vicuna, merge=False)
    vlm.adapter("one")
    torch.testing.assert_close(apart.logits(asked(picture)), vlm.logits(asked(picture)), atol=1e-4, rtol=0)
    assert apart.adapters == ["default"]


# ------------------------------------------------------------------------------------------- projectors, MPT, v1.6


@pytest.mark.parametrize("n_rows", [2, PIECES + 2], ids=["two rows", "the whole table"])
def test_an_old_projector_file_brings_its_two_rows(
    clip: Path, tmp_path: Path, vicuna: Path, picture: Path, n_rows: int
) -> None:
    folder = tiny.write_projector(tmp_path / "p", clip=clip, start_end=True, mm_projector_type="linear")
    tiny.write_tokenizer(folder, added=("<im_start>", "<im_end>"), legacy=None)
    held = torch.load(folder / "mm_projector.bin", weights_only=True)
    two = held["model.embed_tokens.weight"]
    assert len(two) == 2
    if n_rows > 2:
        noise = tiny.tensor(4, "noise", (PIECES, two.shape[1]), 0.5).to(two.dtype)
        held["model.embed_tokens.weight"] = torch.cat([noise, two])
        torch.save(held, folder / "mm_projector.bin")
    vlm = opened(folder, base=vicuna)
    given = vlm.prepare(asked(picture))
    place = given.token_ids.index(-200)
    assert given.token_ids[place - 1 : place + 2] == [PIECES, -200, PIECES + 1]
    table = dict(vlm.model.state_dict())["decoder.embed.weight"]
    assert torch.equal(table[PIECES : PIECES + 2].float(), two.float())
    under = stored(vicuna)["model.embed_tokens.weight"]
    assert torch.equal(table[:PIECES].float(), under.float())


def test_a_saved_again_mpt_is_understood(mpt: Path, clip: Path, tmp_path: Path, picture: Path) -> None:
    again = tmp_path / "x"
    shutil.copytree(mpt, again)
    tiny.edit_json(again / "config.json", attn_config={"model_type": ""})
    index = json.loads((again / "pytorch_model.bin.index.json").read_text())
    torch.save({"lm_head.weight": stored(mpt)["transformer.wte.weight"]}, again / "pytorch_model-head.bin")
    index["weight_map"]["lm_head.weight"] = "pytorch_model-head.bin"
    tiny.write_json(again / "pytorch_model.bin.index.json", index)
    assert torch.equal(opened(again).logits(asked(picture)), opened(mpt).logits(asked(picture)))


def test_the_tower_in_the_shards_is_the_one_that_looks(clip: Path, next_: Path, tmp_path: Path, picture: Path) -> None:
    other = tiny.write_clip(tmp_path / "clip", seed=11)
    assert torch.equal(opened(next_).logits(asked(picture)), opened(next_, vision_tower=other).logits(asked(picture)))


def test_left_padding_is_a_fact_of_the_config(clip: Path, tmp_path: Path, command: Command) -> None:
    facts = tiny.ANYRES | {"tokenizer_padding_side": "left"}
    source = tiny.write_llava(tmp_path / "x", layout="safetensors", clip=clip, tower_seed=5, **facts)
    command("convert", source, tmp_path / "n", "--no-check")
    command("convert", tmp_path / "n", tmp_path / "o", "--to", "original", "--no-check")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["tokenizer_padding_side"] == "left"
