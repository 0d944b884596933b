"""Advice about questions, pictures and options of the commands that ask a model."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

import llava
from tests import tiny
from tests.advice.files import ask
from tests.advice.table import Run, Steps, World, advice

CPU = {"dtype": "float32", "device": "cpu"}


def ask_about(model: object, picture: object, *more: object) -> Run:
    return ("ask", picture, "Hi", "--model", model, "--max-new-tokens", 1, *more)


def in_python(model: object, messages: object, **options: object) -> Run:
    return lambda: llava.load(model, **CPU).generate(messages, max_new_tokens=1, **options)


@advice("this version does not support quantization; omit it")
def quantization(w: World) -> Steps:
    yield ask(w.llava, "--quantize", "int8")
    yield ask(w.llava)


@advice("none; load with at least one adapter")
def an_adapter_that_was_not_loaded(w: World) -> Steps:
    yield lambda: llava.load(w.llama, **CPU).adapter("a")
    yield lambda: llava.load(w.llama, adapters={"a": w.lora}, **CPU).adapter("a")


@advice("using llava-tiny, which recognises only drawn objects. To load another model, pass --model FOLDER_OR_HUB_ID.")
def no_model(w: World) -> Steps:
    yield ("ask", "Hi", "--max-new-tokens", 1)
    yield ask(w.llava)


@advice("--adapter is {}; expected NAME=FOLDER_OR_HUB_ID")
def an_adapter_without_a_name(w: World) -> Steps:
    yield ask(w.llama, "--adapter", w.lora, "--template", "v1")
    yield ask(w.llama, "--adapter", f"mine={w.lora}", "--template", "v1")


@advice("put the question last, in quotes: {}")
def a_forgotten_question(w: World) -> Steps:
    picture = w / "a picture.png"
    picture.write_bytes(w.picture.read_bytes())
    said = yield ("ask", picture)
    yield (*said.advised(), "--model", w.llava, "--max-new-tokens", 1)


def explaining(w: World, *words: object) -> Run:
    return ("explain", *words, "--model", w.llava, "--max-new-tokens", 1)


@advice("--out {}: ends with {}; choose a .png or .html file")
def an_explanation_of_another_type(w: World) -> Steps:
    yield explaining(w, w.picture, "Hi", "--out", w / "words.pdf")
    yield explaining(w, w.picture, "Hi", "--out", w / "words.html")


@advice('there is no image to look at; put it before the question: llava explain IMAGE "QUESTION"')
def an_explanation_without_an_image(w: World) -> Steps:
    yield explaining(w, "Hi", "--out", w / "words.png")
    yield explaining(w, w.picture, "Hi", "--out", w / "words.png")


@advice("there is no picture to look at; pass one with the question")
def an_attention_map_without_a_picture(w: World) -> Steps:
    yield lambda: llava.load(w.llava, **CPU).attention_map("Hi", max_new_tokens=1)
    yield lambda: llava.load(w.llava, **CPU).attention_map("<image>\nHi", images=[w.picture], max_new_tokens=1)


@advice("no such image file; if it is part of the question, put the whole question in quotes")
def a_question_without_quotes(w: World) -> Steps:
    yield ("ask", "What", "is", "this?", "--model", w.llava, "--max-new-tokens", 1)
    yield ("ask", "What is this?", "--model", w.llava, "--max-new-tokens", 1)


@advice("- reads an image from standard input, which is empty; pipe an image file into the command")
def no_picture_on_standard_input(w: World) -> Steps:
    yield ask_about(w.llava, "-")
    w.stdin.write(w.picture.read_bytes())
    w.stdin.seek(0)


@advice("--layers is {}; expected comma-separated layer numbers, e.g. 8,16,-1")
def layers_that_are_no_numbers(w: World) -> Steps:
    (w / "texts.txt").write_text("Once\n")
    command = ("features", w.llava, "--input", w / "texts.txt", "--out", w / "out.safetensors", "--layers")
    yield (*command, "last")
    yield (*command, "0,1,-1")


@advice("--max-new-tokens is {}; expected 1 or more")
def no_new_tokens(w: World) -> Steps:
    yield ("ask", "Hi", "--model", w.llava, "--max-new-tokens", 0)
    yield ("ask", "Hi", "--model", w.llava, "--max-new-tokens", 1)


@advice("no entry matches; run llava zoo without filters to list all entries")
def filters_that_match_nothing(w: World) -> Steps:
    yield ("zoo", "--vision-encoder", "nothing")
    yield ("zoo",)


@advice("run llava zoo to list all entries")
def an_unknown_entry(w: World) -> Steps:
    said = yield ("zoo", "show", "qqqq")
    assert said.advised() == ["zoo", "to", "list", "all", "entries"]
    yield ("zoo",)


@advice("0, as num_beams= (--num-beams) is above 1")
def beams_at_a_temperature(w: World) -> Steps:
    yield ask(w.llava, "--num-beams", 2, "--temperature", 0.5)
    yield ask(w.llava, "--num-beams", 2, "--temperature", 0)


# ------------------------------------------------------------------------------------------------------------ engine


@advice("requests are limited to it; raise cache_memory= (--cache-memory) for longer ones")
def a_cache_shorter_than_the_context(w: World) -> Steps:
    yield ask(w.llava, "--cache-memory", "64KiB")
    yield ask(w.llava, "--cache-memory", "64MiB")


@advice("less than the {} bytes of a page of {} tokens; raise it")
def a_cache_smaller_than_a_page(w: World) -> Steps:
    said = yield ask(w.llava, "--cache-memory", "1KB")
    page_bytes = int(re.findall(r"less than the (\d+) bytes", said.text)[0])
    yield ask(w.llava, "--cache-memory", 8 * page_bytes)


@advice(", or raise cache_memory= (--cache-memory)")
def a_prompt_longer_than_the_cache(w: World) -> Steps:
    yield ask(w.llava, "--cache-memory", "48KiB")
    yield ask(w.llava, "--cache-memory", "64MiB")


@advice("GiB are free; lower it")
def a_cache_larger_than_the_memory(w: World) -> Steps:
    yield ask(w.llava, "--cache-memory", "900TiB")
    yield ask(w.llava, "--cache-memory", "64MiB")


@advice("reduce num_beams= (--num-beams) or max_new_tokens= (--max-new-tokens)")
def beams_that_need_more_memory(w: World) -> Steps:
    asked = ("ask", "Hi", "--model", w.llava, "--cache-memory", "512KiB", "--num-beams", 50, "--max-new-tokens")
    yield (*asked, 50)
    yield (*asked[:-2], 2, "--max-new-tokens", 4)


def overflowing(w: World) -> Path:
    """A model whose states exceed the range of float16."""
    folder = w.copy("single")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 60_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@advice("the logits contain NaN or infinity; load with dtype=float32 (--dtype float32) if the model overflows")
def a_model_that_overflows(w: World) -> Steps:
    folder = overflowing(w)
    yield ask(folder, "--dtype", "float16")
    yield ask(folder, "--dtype", "float32")


@advice("the logits contain NaN or infinity; load with dtype=float32 (--dtype float32) if the model overflows")
def a_model_that_overflows_in_a_beam_search(w: World) -> Steps:
    folder = overflowing(w)
    yield ask(folder, "--dtype", "float16", "--num-beams", 2)
    yield ask(folder, "--dtype", "float32", "--num-beams", 2)


# ----------------------------------------------------------------------------------------------------------- prompts


@advice("set template= (--template) to one of {}")
def no_template(w: World) -> Steps:
    said = yield ask(w.llama)
    yield ask(w.llama, "--template", said.text.strip().rpartition(", ")[2])


@advice("unknown template {}; choose one of {}")
def an_unknown_template(w: World) -> Steps:
    said = yield ask(w.llama, "--template", "v9")
    yield ask(w.llama, "--template", said.text.strip().rpartition(", ")[2])


@advice("choose another template with template= (--template)")
def a_second_question_to_the_plain_template(w: World) -> Steps:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    yield in_python(w.llava, messages, template="plain")
    yield in_python(w.llava, messages, template="v1")


@advice("the first message has no text, which this template does not support: add some text")
def an_empty_first_message(w: World) -> Steps:
    yield in_python(w.llava, [{"role": "user", "content": ""}], template="llama_2")
    yield in_python(w.llava, [{"role": "user", "content": "Hi"}], template="llama_2")


@advice("the conversation has no user message: add at least one")
def no_user_message(w: World) -> Steps:
    yield in_python(w.llava, [])
    yield in_python(w.llava, [{"role": "user", "content": "Hi"}])


@advice("images= is only for raw prompts; in a conversation, put the images into the messages")
def images_beside_a_conversation(w: World) -> Steps:
    def prepare(messages: object, **more: object) -> Run:
        return lambda: llava.load(w.llava, **CPU).preprocessor.prepare(messages, **more)

    yield prepare([{"role": "user", "content": "Hi"}], images=[w.picture])
    content = [{"type": "image", "image": str(w.picture)}, {"type": "text", "text": "Hi"}]
    yield prepare([{"role": "user", "content": content}])


@advice("(or was loaded without it): leave the images out")
def a_picture_for_a_language_model(w: World) -> Steps:
    yield ask_about(w.llama, w.picture, "--template", "v1")
    yield ask(w.llama, "--template", "v1")


@advice("the {} is empty: add some text")
def an_empty_prompt(w: World) -> Steps:
    mpt = llava.load(w.mpt, **CPU)  # its tokenizer adds no <s>
    yield lambda: mpt.generate("", max_new_tokens=1)
    yield lambda: mpt.generate("Hi", max_new_tokens=1)


@advice("but the model has only {} embeddings: remove this text")
def a_token_without_an_embedding(w: World) -> Steps:
    folder = w.copy("single")
    tiny.write_tokenizer(folder, added=("<extra>",))
    yield ("ask", "Hi <extra>", "--model", folder, "--max-new-tokens", 1)
    yield ask(folder)


@advice("which exceeds the model's context of {}: shorten the {}")
def a_prompt_longer_than_the_context(w: World) -> Steps:
    yield ("ask", "Hi " * 9000, "--model", w.llava, "--max-new-tokens", 1)
    yield ask(w.llava)


@advice("which leaves no room for a reply in {} of {} tokens; shorten the prompt")
def a_prompt_as_long_as_the_context(w: World) -> Steps:
    vlm = llava.load(w.llava, **CPU)
    n = 1
    while len(vlm.preprocessor.prepare("a" * n).ids) < vlm.config.decoder.max_seq:
        n += vlm.config.decoder.max_seq - len(vlm.preprocessor.prepare("a" * n).ids)
    yield lambda: vlm.generate("a" * n, max_new_tokens=1)
    yield lambda: vlm.generate("a", max_new_tokens=1)


@advice("the prompt has {}: write one placeholder for each image{}")
def a_prompt_without_its_placeholder(w: World) -> Steps:
    vlm = llava.load(w.llava, **CPU)
    yield lambda: vlm.preprocessor.prepare("Hi", images=[w.picture])
    yield lambda: vlm.preprocessor.prepare("<image>\nHi", images=[w.picture])


@advice("; escape it as \\{} where it is literal text")
def a_literal_placeholder(w: World) -> Steps:
    vlm = llava.load(w.llava, **CPU)
    yield lambda: vlm.preprocessor.prepare("What is <image>?")
    yield lambda: vlm.preprocessor.prepare("What is \\<image>?")


# ---------------------------------------------------------------------------------------------------------- pictures


@advice("and may be a decompression bomb; scale the image down")
def a_picture_that_is_too_large(w: World) -> Steps:
    Image.new("1", (20000, 20000)).save(w / "large.png")
    yield ask_about(w.llava, w / "large.png")
    Image.new("1", (200, 200)).save(w / "large.png")


@advice("for an array or a tensor, pass PIL.Image.fromarray(array), with array as uint8 [height, width, 3]")
def an_array_as_a_picture(w: World) -> Steps:
    pixels = np.zeros((8, 8, 3), np.uint8)

    def content(image: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]

    yield in_python(w.llava, content(pixels))
    yield in_python(w.llava, content(Image.fromarray(pixels)))


@advice("to use another range, save the image with 8 bits per channel beforehand")
def a_picture_of_floats(w: World) -> Steps:
    pixels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(pixels).save(w / "floats.tiff")
    yield ask_about(w.llava, w / "floats.tiff")
    Image.fromarray((pixels * 255).astype(np.uint8)).save(w / "floats.tiff")


@advice("its values include NaN or infinity; replace them, and save the image with 8 bits per channel")
def a_picture_with_nan(w: World) -> Steps:
    pixels = np.full((8, 8), np.nan, np.float32)
    Image.fromarray(pixels).save(w / "nan.tiff")
    yield ask_about(w.llava, w / "nan.tiff")
    Image.fromarray(np.nan_to_num(pixels).astype(np.uint8)).save(w / "nan.tiff")


@advice("so few shades are left in 8 bits; scale its values up beforehand")
def a_dark_picture_of_16_bits(w: World) -> Steps:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(w / "dark.png")
    yield ask_about(w.llava, w / "dark.png")
    Image.fromarray(pixels * 1000).save(w / "dark.png")


@advice("white or black, set transparency=white (--transparency white)")
def a_transparent_picture(w: World) -> Steps:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(w / "clear.png")
    yield ask_about(w.llava, w / "clear.png")
    yield ask_about(w.llava, w / "clear.png", "--transparency", "white")


# -------------------------------------------------------------------------------------------------- chat and features


def chat(w: World, *lines: str) -> Run:
    w.stdin.seek(0)
    w.stdin.truncate()
    w.stdin.write("".join(f"{line}\n" for line in (*lines, "/quit")).encode())
    w.stdin.seek(0)
    return ("chat", "--model", w.llava, "--max-new-tokens", 1)


@advice("specify a file: /image PATH")
def a_picture_without_a_path(w: World) -> Steps:
    yield chat(w, "/image")
    yield chat(w, f"/image {w.picture}")


@advice("specify a file: /save FILE")
def a_file_without_a_path(w: World) -> Steps:
    yield chat(w, "/save")
    yield chat(w, f"/save {w / 'messages.json'}")


@advice("{}: already exists and is not from this chat; choose another file")
def messages_over_another_file(w: World) -> Steps:
    (w / "notes.txt").write_text("mine")
    yield chat(w, "Hi", f"/save {w / 'notes.txt'}")
    assert (w / "notes.txt").read_text() == "mine"
    yield chat(w, "Hi", f"/save {w / 'messages.json'}")


@advice("{}: cannot be written ({}); choose another file, or create its folder")
def messages_in_no_folder(w: World) -> Steps:
    yield chat(w, "Hi", f"/save {w / 'new' / 'messages.json'}")
    (w / "new").mkdir()
    yield chat(w, "Hi", f"/save {w / 'new' / 'messages.json'}")


def features(w: World, out: object, *more: object) -> Run:
    (w / "texts.txt").write_text("Once\nTwice\n")
    return ("features", w.llava, "--input", w / "texts.txt", "--layers", "-1,0", "--out", out, *more)


@advice("{}: already exists; remove it, or choose another file")
def features_that_exist(w: World) -> Steps:
    out = w / "out.safetensors"
    out.write_bytes(b"")
    yield features(w, out)
    out.unlink()


@advice("{}: the folder {} does not exist; create it first")
def features_in_no_folder(w: World) -> Steps:
    yield features(w, w / "new" / "out.safetensors")
    (w / "new").mkdir()


@advice("{}: the folder {} is read-only; choose another folder")
def features_in_a_folder_of_others(w: World) -> Steps:
    with mock.patch("llava.tensors.atomic.os.access", side_effect=lambda path, mode: not mode & 2):
        yield features(w, w / "out.safetensors")


@advice("split the input into parts of at most {}")
def features_with_too_many_rows(w: World) -> Steps:
    with mock.patch("llava.features.MAX_HEADER_BYTES", 64 + 2 * 150):
        said = yield features(w, w / "out.safetensors")
        assert "at most 1 row\n" in said.text
        (w / "part.txt").write_text("Once\n")
        yield ("features", w.llava, "--input", w / "part.txt", "--layers", "-1,0", "--out", w / "out.safetensors")


@advice("write fewer layers")
def features_with_too_many_layers(w: World) -> Steps:
    with mock.patch("llava.features.MAX_HEADER_BYTES", 64 + 2 * 140):
        yield ("features", w.llava, "--input", _one(w), "--layers", "-1,0,1", "--out", w / "out.safetensors")
        yield ("features", w.llava, "--input", _one(w), "--layers", "-1", "--out", w / "out.safetensors")


def _one(w: World) -> object:
    (w / "one.txt").write_text("Once\n")
    return w / "one.txt"
