"""Runs every command as a real process on small random checkpoints."""

import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import llava
from llava.errors import ImageError, PromptError
from llava.features import Row, extract
from tests import command, tiny
from tests.command import run, run_well

QUESTION = "What is it?"
SHORT = ("--max-new-tokens", "24")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    noise = torch.randint(256, (6, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).resize((90, 60)).save(path)
    return path


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> llava.Assistant:
    return llava.load(checkpoint)


@pytest.fixture(scope="module")
def anyres(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like LLaVA-1.6: safetensors, tiles, and a tower of its own that differs from the CLIP folder."""
    folder = tmp_path_factory.mktemp("v16") / "llava"
    return tiny.write_llava(folder, layout="safetensors-shards", clip=clip, tower_seed=3, **tiny.ANYRES)


@pytest.fixture(scope="module")
def native(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in our own layout."""
    folder = tmp_path_factory.mktemp("converted") / "native"
    run_well("convert", checkpoint, folder, "--verify")
    assert [path.name for path in folder.parent.iterdir()] == ["native"]
    return folder


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys; sys.argv = ['llava', '--help']\n"
        "from llava.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'asyncio'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run_well("-c", code, command=[sys.executable])
    assert done.stderr.strip() == "[]"
    for name in ("ask", "chat", "inspect", "convert", "features"):
        assert name in done.stdout


def test_help_is_nearly_as_fast_as_a_bare_typer_program(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import typer\n\napp = typer.Typer()\n\n\n"
        "@app.command()\ndef one(name: str) -> None:\n    print(name)\n\n\n"
        "@app.command()\ndef two(name: str) -> None:\n    print(name)\n\n\napp()\n"
    )
    seconds: dict[str, list[float]] = {"bare": [], "llava": []}
    for _ in range(40):  # a busy machine needs more tries for the fastest run of each
        for name, argv in (("bare", [sys.executable, str(bare)]), ("llava", command.LLAVA)):
            start = time.perf_counter()
            run_well("--help", command=argv)
            seconds[name].append(time.perf_counter() - start)
        if len(seconds["bare"]) >= 5 and min(seconds["llava"]) <= min(seconds["bare"]) + 0.1:
            return
    pytest.fail(f"{min(seconds['llava'])=:.3f} s, {min(seconds['bare'])=:.3f} s")


# ------------------------------------------------------------------------------------------------ ask


def test_ask_prints_the_answer(checkpoint: Path, vlm: llava.Assistant, photo: Path) -> None:
    done = run_well("ask", photo, QUESTION, "--model", checkpoint, *SHORT)
    assert done.stdout.removesuffix("\n") == vlm.ask(photo, QUESTION, max_new_tokens=24)
    assert done.stderr == ""


def test_ask_reads_a_picture_from_stdin(checkpoint: Path, vlm: llava.Assistant) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 50), "teal").save(file, format="JPEG")
    done = run_well("ask", "-", QUESTION, "--model", checkpoint, *SHORT, stdin=file.getvalue())
    assert done.stdout.removesuffix("\n") == vlm.ask(file.getvalue(), QUESTION, max_new_tokens=24)


def test_ask_with_json_prints_one_object(checkpoint: Path, vlm: llava.Assistant, photo: Path) -> None:
    done = run_well("ask", photo, QUESTION, "--model", checkpoint, "--json", *SHORT)
    answer = json.loads(done.stdout)
    assert answer["text"] == vlm.ask(photo, QUESTION, max_new_tokens=24)
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["usage"]["image_tokens"] == tiny.N_PATCHES
    assert answer["timings"]


def test_ask_takes_several_pictures(checkpoint: Path, vlm: llava.Assistant, photo: Path) -> None:
    two = run_well("ask", photo, photo, "Compare.", "--model", checkpoint, *SHORT)
    assert two.stdout.removesuffix("\n") == vlm.ask([photo, photo], "Compare.", max_new_tokens=24)


def test_ask_takes_the_options_of_load(tmp_path: Path, vlm: llava.Assistant, clip: Path, photo: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava")  # its config names the hub id of CLIP
    options = ["--vision-tower", clip, "--template", "mistral_instruct", "--dtype", "float32", "--device", "cpu"]
    done = run_well("ask", photo, QUESTION, "--model", folder, *options, *SHORT)
    answer = vlm.ask(photo, QUESTION, template="mistral_instruct", max_new_tokens=24)
    assert done.stdout.removesuffix("\n") == answer


@pytest.mark.parametrize(
    "words", [["kitchen.png"], ["kitchen.png", "garden.JPEG"], ["scan"], ["not_there.webp"], ["-"]]
)
def test_a_forgotten_question_is_refused_before_the_model_loads(words: list[str], tmp_path: Path) -> None:
    for name in ("kitchen.png", "garden.JPEG"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "scan", "PNG")
    done = run("ask", *words, "--model", tmp_path / "no_model", cwd=tmp_path, stdin=b"")
    command.assert_one_line_error(done, words[-1], f'llava ask {words[-1]} "What is this?"')


def test_a_question_may_name_a_file_or_the_image_tag(checkpoint: Path, vlm: llava.Assistant, tmp_path: Path) -> None:
    (tmp_path / "Hello").write_text("no image")
    for question in ("What is in kitchen.png", "What does the <image> tag mean?", "Hello"):
        done = run_well("ask", question, "--model", checkpoint, "--max-new-tokens", 4, cwd=tmp_path)
        assert done.stdout.strip() == vlm.ask(None, question, max_new_tokens=4)


def test_an_empty_stdin_and_a_folder_are_no_images(checkpoint: Path, tmp_path: Path) -> None:
    command.assert_one_line_error(run("ask", "-", "?", "--model", checkpoint, stdin=b""), "standard input", "empty")
    command.assert_one_line_error(run("ask", tmp_path, "?", "--model", checkpoint), f"{tmp_path}: is a folder")


@pytest.mark.parametrize("name", ["ask", "chat"])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--max-new-tokens", 0, "1 or more"), ("--top-p", 3, "at most 1"), ("--repetition-penalty", 0, "above 0")],
)
def test_a_wrong_sampling_option_is_named_before_the_model_loads(
    name: str, option: str, value: int, expected: str, tmp_path: Path
) -> None:
    words = ["Say hello."] if name == "ask" else []
    done = run(name, *words, "--model", tmp_path / "no_model", option, value, stdin=b"")
    command.assert_one_line_error(done, option, expected)


@pytest.fixture
def logo(tmp_path: Path) -> Path:
    """Black on transparent black."""
    image = Image.new("RGBA", (60, 40))
    image.paste((0, 0, 0, 255), (20, 10, 40, 30))
    image.save(tmp_path / "logo.png")
    return tmp_path / "logo.png"


@pytest.mark.parametrize("colour", ["white", "black"])
def test_transparency_places_an_image_on_a_background(
    colour: str, checkpoint: Path, vlm: llava.Assistant, logo: Path
) -> None:
    flat = Image.new("RGB", (60, 40), colour)
    flat.paste(Image.open(logo), mask=Image.open(logo))
    options = ["--model", checkpoint, "--max-new-tokens", 8, "--transparency", colour]
    done = run_well("ask", logo, "What is it?", *options)
    assert done.stdout.strip() == vlm.ask(flat, "What is it?", max_new_tokens=8)
    assert done.stderr == ""


def test_dropped_transparency_is_reported_in_one_line(checkpoint: Path, vlm: llava.Assistant, logo: Path) -> None:
    done = run_well("ask", logo, "What is it?", "--model", checkpoint, "--max-new-tokens", 8)
    assert done.stdout.strip() == vlm.ask(Image.new("RGB", (60, 40)), "What is it?", max_new_tokens=8)
    assert len(done.stderr.splitlines()) == 1
    assert f"{logo}: 83% of its pixels are transparent" in done.stderr
    talk = f"/image {logo}\nWhat is it?\nIs it black?\nAnd now?\n".encode()
    chat = run_well("chat", "--model", checkpoint, "--max-new-tokens", 2, stdin=talk)
    assert chat.stderr.count("transparent") == 1


def test_an_unknown_transparency_is_refused(checkpoint: Path, logo: Path) -> None:
    done = run("ask", logo, "?", "--model", checkpoint, "--transparency", "pink")
    command.assert_one_line_error(done, "transparency", "pink", "drop or white or black")


# ------------------------------------------------------------------------------------------------ chat


def test_chat_commands_without_a_usable_file_say_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    lines = f"/image\n/image {tmp_path}\n/save\n/save {tmp_path}/none/talk.json\n"
    done = run_well("chat", "--model", checkpoint, stdin=lines.encode())
    assert done.stdout.splitlines() == ["specify a file: /image PATH", "specify a file: /save FILE"]
    folder, missing = done.stderr.splitlines()
    assert folder == f"llava: {tmp_path}: is a folder; expected an image file"
    assert missing.startswith(f"llava: {tmp_path}/none/talk.json: cannot be written (No such file or directory)")
    assert "partial" not in missing


def test_chat_keeps_the_conversation_and_saves_it(checkpoint: Path, vlm: llava.Assistant, photo: Path) -> None:
    saved = photo.parent / "talk.json"
    lines = ["Say hello.", f"/image {photo}", "What is on it?", f"/save {saved}", "/reset", "Say hello.", "/quit", "no"]
    options = ["--max-new-tokens", "12", "--temperature", "0"]
    done = run_well("chat", "--model", checkpoint, *options, stdin="\n".join(lines).encode() + b"\n")
    hello = vlm.ask(None, "Say hello.", max_new_tokens=12)
    picture = [{"type": "image", "image": photo}, {"type": "text", "text": "What is on it?"}]
    messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": hello}]
    second = vlm.generate([*messages, {"role": "user", "content": picture}], max_new_tokens=12).text
    assert done.stdout.count(hello) == 2  # /reset starts a new conversation
    assert second in done.stdout
    record = saved.read_text()
    assert "Say hello." in record
    assert "What is on it?" in record
    assert "no such" not in done.stderr


def test_chat_saves_over_its_own_file_only(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    lines = f"/save {tmp_path}/a.json\nSay hello.\n/save {tmp_path}/a.json\n/save {tmp_path}/data.json\n"
    done = run_well("chat", "--model", checkpoint, "--max-new-tokens", 2, stdin=lines.encode())
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2
    assert done.stderr.strip().startswith(f"llava: {tmp_path}/data.json: already exists")
    assert (tmp_path / "data.json").read_text() == "[]"


def test_a_photo_of_108_megapixels_is_read_without_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("1", (12000, 9000)).save(tmp_path / "photo.png")
    done = run_well("ask", tmp_path / "photo.png", "What is it?", "--model", checkpoint, "--max-new-tokens", 2)
    assert done.stderr == ""


def test_features_report_a_bad_last_row_before_the_model_runs(vlm: llava.Assistant, tmp_path: Path) -> None:
    bad = {"none.png: no such image": Row("Hi", str(tmp_path / "none.png")), "placeholder": Row("<image>\nHi", None)}
    good, done = [Row("Hi", None)] * 2, list[int]()
    for message, row in (bad | {"context": Row("dog " * 5000, None)}).items():
        with pytest.raises((ImageError, PromptError), match=f"^row 2: .*{message}"):
            extract(vlm, [*good, row], [0], tmp_path / "f.safetensors", progress=lambda n, _: done.append(n))
    assert not done


def test_chat_continues_after_a_missing_picture(checkpoint: Path) -> None:
    lines = b"/image nowhere.png\nSay hello.\n/unknown\n"  # the end of the input ends the chat
    done = run_well("chat", "--model", checkpoint, "--max-new-tokens", "4", "--temperature", "0", stdin=lines)
    assert "nowhere.png" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    hello = llava.load(checkpoint).ask(None, "Say hello.", max_new_tokens=4)
    assert hello in done.stdout


# ------------------------------------------------------------------------------------------------ inspect


def inspect(*args: object) -> dict[str, Any]:
    return json.loads(run_well("inspect", *args, "--json").stdout)


INSPECT_KEYS = {
    *("kind", "evidence", "base", "sizes", "template", "image_mode", "missing", "unused", "memory_bytes", "context"),
}


def test_inspect_describes_a_merged_checkpoint(tmp_path: Path) -> None:
    seen = inspect(tiny.write_llava(tmp_path / "llava"))  # CLIP is missing and not needed
    assert set(seen) >= INSPECT_KEYS
    assert isinstance(seen["kind"], str)
    assert seen["evidence"]
    assert all(isinstance(line, str) for line in seen["evidence"])
    assert seen["base"] is None
    assert (seen["template"], seen["image_mode"], seen["context"]) == ("llava_v1", "original", 4096)
    assert seen["missing"] == []
    assert not [key for key in seen["unused"] if "inv_freq" not in key]
    assert seen["sizes"]


def test_inspect_distinguishes_the_families(tmp_path: Path, checkpoint: Path, native: Path) -> None:
    plain = tiny.write_llama(tmp_path / "llama")
    seen = [inspect(folder) for folder in (checkpoint, plain, native)]
    assert len({one["kind"] for one in seen}) == 3
    assert [one["template"] for one in seen] == ["llava_v1", None, "llava_v1"]
    assert all(one["missing"] == [] for one in seen)
    memory = seen[1]["memory_bytes"]
    weights = sum(value.numel() for value in tiny.llama_tensors(tiny.llama_config(), 1, inv_freq=False).values())
    assert memory["bf16"] == pytest.approx(2 * weights, rel=0.01)
    assert memory["bf16"] > memory["int8"] > memory["int4"] > 0


def test_inspect_lists_missing_and_unused_tensors(clip: Path, tmp_path: Path) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout="safetensors", clip=clip)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.strange.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tiny.save(tensors, folder, "safetensors")
    seen = inspect(folder)
    assert any("layers.1" in key or "blocks.1" in key for key in seen["missing"])
    assert any("strange" in key for key in seen["unused"])


def test_inspect_prints_the_evidence_for_its_decision(tmp_path: Path, clip: Path) -> None:
    old = tiny.write_llava(tmp_path / "llava", clip=clip, architectures=["LlamaForCausalLM"])
    shown = run_well("inspect", old).stdout
    assert "llava_v0" in shown
    assert "LlamaForCausalLM" in shown  # the deciding value
    assert "4096" in shown


@pytest.mark.parametrize(("layout", "options"), [("bin", ["--json"]), ("safetensors", [])])
def test_inspect_scan_reports_nan_inf_and_all_zero_tensors(
    clip: Path, tmp_path: Path, layout: tiny.Layout, options: list[str]
) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout=layout, clip=clip)
    (file,) = (path for path in folder.iterdir() if path.name in ("pytorch_model.bin", "model.safetensors"))
    tensors = torch.load(file) if layout == "bin" else load_file(file)
    tensors["model.embed_tokens.weight"][3, 5] = torch.nan
    tensors["model.layers.0.self_attn.o_proj.weight"][1, 1] = torch.inf
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    tiny.save(tensors, folder, layout)
    done = run("inspect", folder, "--scan", *options)
    shown = "".join(done.stdout.split())  # Rich may wrap lines anywhere
    for place in ("embed", "layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"):
        assert place in shown
    for fault in ("nan", "inf", "zero"):
        assert fault in shown.lower()
    assert "Traceback" not in done.stderr


def test_inspect_scan_of_an_intact_checkpoint_finds_nothing(anyres: Path) -> None:
    seen = inspect(anyres, "--scan")
    assert seen["missing"] == []
    scan = {key: value for key, value in seen.items() if key not in INSPECT_KEYS and not isinstance(value, str)}
    assert scan
    assert not any("weight" in str(value) or "bias" in str(value) for value in scan.values()), scan  # no tensor's name


# ------------------------------------------------------------------------------------------------ convert


def names_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """All tensors in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                part = stored.get_slice(key)
                found[key] = (part.get_dtype(), tuple(part.get_shape()))
    return found


@pytest.mark.parametrize("source", ["v1.5", "v1.6"])
def test_the_native_form_is_self_contained_and_has_the_same_bits(
    tmp_path: Path, checkpoint: Path, native: Path, anyres: Path, photo: Path, source: str
) -> None:
    if source == "v1.6":
        checkpoint, native = anyres, tmp_path / "native"
        run_well("convert", checkpoint, native)
    moved = shutil.copytree(native, tmp_path / "elsewhere")
    assert not any(
        str(checkpoint.parent) in path.read_text() for path in moved.glob("*.json")
    )  # no reference to the source
    before, after = (llava.load(folder, dtype="float32") for folder in (checkpoint, moved))
    messages = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]}]
    one, other = before.prepare(messages), after.prepare(messages)
    assert (other.prompt, other.token_ids) == (one.prompt, one.token_ids)
    assert torch.equal(other.pixels, one.pixels)
    assert torch.equal(after.vision_features(one.pixels), before.vision_features(one.pixels))
    assert torch.equal(after.logits(messages), before.logits(messages))


def test_the_native_form_is_safetensors_with_our_names_and_one_config(checkpoint: Path, native: Path) -> None:
    names = names_of(native)
    assert {key.split(".")[0] for key in names} == {"vision", "projector", "decoder"}
    assert names["decoder.blocks.1.attn.qkv.weight"] == ("F16", (192, 64))
    assert not list(native.glob("*.bin"))
    assert (native / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    assert json.loads((native / "config.json").read_text())


def test_a_native_form_of_several_shards_has_an_index(
    checkpoint: Path, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.convert import convert as job
    from llava.tensors.writer import write_shards

    monkeypatch.setitem(write_shards.__kwdefaults__, "max_bytes", 200_000)  # 5 GB would take too long
    job.convert(checkpoint, tmp_path / "sharded")
    (index,) = (tmp_path / "sharded").glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 205_000 for path in shards)
    assert {path.name for path in shards} == set(weight_map.values())
    assert names_of(tmp_path / "sharded") == names_of(native)
    one, other = (llava.load(folder) for folder in (native, tmp_path / "sharded"))
    assert torch.equal(one.logits("Once upon a time"), other.logits("Once upon a time"))


def test_the_native_form_records_the_template_that_was_found(clip: Path, tmp_path: Path) -> None:
    old = tiny.write_llava(tmp_path / "old", clip=clip, architectures=["LlamaForCausalLM"])
    run_well("convert", old, tmp_path / "native")
    hello = [{"role": "user", "content": "Hello."}]
    prompt = llava.load(tmp_path / "native").prepare(hello).prompt
    assert prompt == llava.load(old).prepare(hello).prompt
    assert "###Human: Hello.###Assistant:" in prompt


def test_converting_the_native_form_again_changes_nothing(native: Path, tmp_path: Path) -> None:
    run_well("convert", native, tmp_path / "twice")
    again = command.files(tmp_path / "twice")
    assert set(again) == set(command.files(native))
    for name in set(again) - {"conversion.md"}:  # it names the source
        assert (native / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_without_vision_the_native_form_is_the_language_model(
    checkpoint: Path, vlm: llava.Assistant, tmp_path: Path
) -> None:
    (tmp_path / "native").mkdir()  # an empty folder is accepted
    run_well("convert", checkpoint, tmp_path / "native", "--no-vision")
    assert {key.split(".")[0] for key in names_of(tmp_path / "native")} == {"decoder"}
    assert torch.equal(llava.load(tmp_path / "native").logits("Once upon a time"), vlm.logits("Once upon a time"))


@pytest.mark.parametrize("source", ["v1.6", "native"])
def test_the_llama_form_is_what_any_llama_loader_opens(tmp_path: Path, native: Path, anyres: Path, source: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = anyres if source == "v1.6" else native
    run_well("convert", folder, tmp_path / "llama", "--to", "llama", "--verify")
    wanted = tiny.llama_tensors(tiny.llama_config(), 1, inv_freq=False)
    assert set(names_of(tmp_path / "llama")) == set(wanted)
    text = "Once upon a time there was a painter."
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = llava.load(folder, vision=False, dtype="float32")
    ids = ours.prepare(text).token_ids
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(text), theirs, rtol=0, atol=1e-4)
    back = llava.load(tmp_path / "llama", dtype="float32")
    assert torch.equal(back.logits(text), ours.logits(text))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "llama").model_type == "llama"
    assert back.prepare(text).token_ids == ids


def test_convert_does_not_touch_a_folder_with_files(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    command.assert_one_line_error(run("convert", checkpoint, tmp_path / "full"), "full")
    assert command.files(tmp_path / "full") == {"mine.txt": 4}


def test_convert_refuses_an_unknown_target(checkpoint: Path, tmp_path: Path) -> None:
    done = run("convert", checkpoint, tmp_path / "out", "--to", "onnx")
    assert done.returncode == 2
    assert "onnx" in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ features


def test_features_of_lines_of_text_are_the_hidden_states(
    checkpoint: Path, vlm: llava.Assistant, tmp_path: Path
) -> None:
    texts = ["Once upon a time", "there was a painter", "a"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "features.safetensors"
    run_well("features", checkpoint, "--input", tmp_path / "texts.txt", "--layers", "0,1,-1", "--out", out)
    stored = load_file(out)
    assert set(stored) == {f"{row}.{layer}" for row in range(3) for layer in (0, 1, -1)}
    for row, text in enumerate(texts):
        for layer, state in vlm.hidden_states(text, [0, 1, -1]).items():
            torch.testing.assert_close(stored[f"{row}.{layer}"].float(), state, rtol=1e-5, atol=1e-5)


def test_rows_of_features_may_have_a_picture(
    checkpoint: Path, vlm: llava.Assistant, photo: Path, tmp_path: Path
) -> None:
    rows = [{"text": "A word"}, {"text": "Before <image> after", "image": str(photo)}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "features.safetensors"
    run_well("features", checkpoint, "--input", tmp_path / "rows.jsonl", "--layers=-1", "--out", out)
    stored = load_file(out)
    plain = vlm.hidden_states("A word", [-1])[-1]
    seen = vlm.hidden_states("Before <image> after", [-1], images=[photo])[-1]
    torch.testing.assert_close(stored["0.-1"].float(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored["1.-1"].float(), seen, rtol=1e-5, atol=1e-5)


def test_a_bad_row_of_features_is_named_and_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "A word"}\n{"words": "none"}\n')
    before = command.files(tmp_path)
    done = run(
        "features", checkpoint, "--input", tmp_path / "rows.jsonl", "--layers=-1", "--out", tmp_path / "f.safetensors"
    )
    command.assert_one_line_error(done, "rows.jsonl")
    assert command.files(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("f.npz", ".safetensors"),
        ("f", ".safetensors"),
        ("full.safetensors", "already exists"),
        ("none/f.safetensors", "does not exist"),
    ],
)
def test_features_check_the_target_before_the_model_loads(out: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A word\n")
    (tmp_path / "full.safetensors").write_text("keep")
    before = command.files(tmp_path)
    options = ["--input", tmp_path / "texts.txt", "--layers", "0", "--out", tmp_path / out]
    command.assert_one_line_error(run("features", tmp_path / "no_model", *options), out, said)
    assert command.files(tmp_path) == before


@pytest.mark.parametrize(("name", "said"), [("none.txt", "No such file"), ("folder", "Is a directory")])
def test_features_name_an_input_that_cannot_be_read(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    options = ["--input", tmp_path / name, "--layers", "0", "--out", tmp_path / "f.safetensors"]
    done = run("features", tmp_path / "no_model", *options)
    command.assert_one_line_error(done, f"{tmp_path / name}: cannot be read ({said}")
    assert "Errno" not in done.stderr


# ------------------------------------------------------------------------------------------------ gpt-fast


def gpt_fast(weights: dict[str, Tensor], ids: list[int], heads: int, kv_heads: int) -> Tensor:
    """gpt-fast's model under its own weight names, which rotates neighbouring pairs. ids [S] -> logits [S, V]"""
    w = {key.removesuffix(".weight"): value.float() for key, value in weights.items()}
    x = w["tok_embeddings"][ids]
    places, dim = x.shape
    head_dim = dim // heads
    turns = torch.arange(places)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    turn = torch.polar(torch.ones_like(turns), turns)  # [S, E / 2]
    future = torch.full((places, places), -torch.inf).triu(1)

    def norm(y: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(y, (dim,), w[name], eps=1e-5)

    def rotated(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    layers = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("layers."))
    for block in (f"layers.{i}." for i in range(layers)):
        qkv = norm(x, f"{block}attention_norm") @ w[f"{block}attention.wqkv"].T
        parts = qkv.split([dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(0, 1) for part in parts)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (rotated(k), v))
        looks = (rotated(q) @ k.transpose(1, 2) / head_dim**0.5 + future).softmax(-1)
        x = x + (looks @ v).transpose(0, 1).flatten(1) @ w[f"{block}attention.wo"].T
        y = norm(x, f"{block}ffn_norm")
        gated = torch.nn.functional.silu(y @ w[f"{block}feed_forward.w1"].T) * (y @ w[f"{block}feed_forward.w3"].T)
        x = x + gated @ w[f"{block}feed_forward.w2"].T
    return norm(x, "norm") @ w["output"].T


@pytest.mark.parametrize(("layout", "kv_heads"), [("bin-shards", 4), ("safetensors-shards", 2)])
def test_the_documented_script_writes_what_gpt_fast_loads(tmp_path: Path, layout: tiny.Layout, kv_heads: int) -> None:
    folder = tiny.write_llava(tmp_path / "llava", layout=layout, num_key_value_heads=kv_heads, tower_seed=3)
    before = command.files(folder)
    done = run_well("--checkpoint_dir", "llava", command=command.CONVERT_HF, cwd=tmp_path)
    assert set(command.files(folder)) - set(before) == {"model.pth"}
    assert len([line for line in (done.stdout + done.stderr).splitlines() if "projector" in line]) == 1
    weights = torch.load(folder / "model.pth", map_location="cpu", mmap=True, weights_only=True)  # as gpt-fast does
    per_layer = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    per_layer = (*per_layer, "attention_norm", "ffn_norm")
    wanted = {f"layers.{i}.{name}.weight" for i in range(2) for name in per_layer}
    assert set(weights) == wanted | {"tok_embeddings.weight", "norm.weight", "output.weight"}
    ours = llava.load(folder, vision=False, dtype="float32")
    ids = ours.prepare("Once upon a time there was a painter").token_ids
    logits = gpt_fast(weights, ids, 4, kv_heads)
    torch.testing.assert_close(logits, ours.logits("Once upon a time there was a painter"), rtol=0, atol=1e-4)


def test_the_script_takes_sizes_from_the_config_and_not_from_the_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "llama-2-70b-chat")
    before = command.files(folder)
    options = ["--checkpoint_dir", folder, "--model_name", "70B", "--output", tmp_path / "elsewhere.pth"]
    run_well(*options, command=command.CONVERT_HF)
    assert command.files(folder) == before
    weights = torch.load(tmp_path / "elsewhere.pth", weights_only=True)
    assert weights["layers.1.attention.wqkv.weight"].shape == (192, 64)
    assert torch.equal(weights["norm.weight"], tiny.tensor(1, "norm", (64,), 0.15, 1.0))


def test_closing_stdout_early_gives_no_traceback(checkpoint: Path) -> None:
    process = command.start("ask", "Say hello.", "--model", checkpoint)
    assert process.stdout is not None
    process.stdout.close()  # as `llava ask … | head -c 0` does
    process.wait(timeout=120)
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()


def test_the_answer_survives_characters_that_a_terminal_would_read_as_markup(clip: Path, tmp_path: Path) -> None:
    """Rich parses [bold] as markup; a reply is plain text."""
    folder = tiny.write_llava(tmp_path / "llava", layout="bin", clip=clip)
    tensors = torch.load(folder / "pytorch_model.bin")
    ids = llava.load(folder, vision=False).prepare("[red]").token_ids
    cycle = [token for token in ids if token != 1][-5:]
    dim = 64
    for key, value in tensors.items():
        if key.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "embed_tokens.weight")):
            value.zero_()
    tensors["model.embed_tokens.weight"][:, 0] = 1  # any other token is followed by the first of the cycle
    tensors["lm_head.weight"][cycle[0], 0] = 1
    for i, token in enumerate(cycle):
        tensors["model.embed_tokens.weight"][token] = torch.nn.functional.one_hot(torch.tensor(i + 1), dim).half()
        tensors["lm_head.weight"][cycle[(i + 1) % len(cycle)], i + 1] = 1
    torch.save(tensors, folder / "pytorch_model.bin")
    wanted = llava.load(folder).ask(None, "Say hello.", max_new_tokens=20)
    assert "[red]" in wanted
    assert run_well("ask", "Say hello.", "--model", folder, "--max-new-tokens", 20).stdout.strip() == wanted
