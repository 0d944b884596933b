"""Does llama.cpp compute the same with our GGUF files as we do? With llava-tiny, on text and pictures, on the CPU.

Converts llava-tiny and opens both files with llama.cpp (llama-cpp-python, which takes minutes to compile:
`pip install 'llava-native[gguf,oracle-gguf]'`). The target is the same 32 greedy tokens for each text prompt and
the same answers about the pictures in examples/pictures. We compute in float32 from the same float16 weights;
llama.cpp rounds activations to float16 before each matrix and looks GELU up in a float16 table, so logits differ by
about 1e-2. The reported margin is the difference between our two highest logits. Pictures are passed both as they
are, so that llama.cpp pads and resizes them in its own way, and after our preprocessing.

Since May 2025 llama.cpp appends CLIP's class token to the patches but reads positions and patches as if it came first
(its issue 25814, open as of November 2026): each patch gets its neighbour's position, and the first patch is lost. No
file can work around this, so llama.cpp's features are compared with ours and with ours computed in the same way. If
the installed build is fixed, record that with `--build`.

    python benchmarks/gguf_oracle.py
"""

import base64
import ctypes
import importlib.metadata
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from result import ROOT, Commit, Out, Result, Save

import llava
from llava.assistant import Assistant
from llava.checkpoint.load import build
from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.convert.convert import convert
from llava.model.llava import Llava

TINY = ROOT / "llava" / "weights" / "llava-tiny"
PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.png"))
TEXTS = ("There is a red", "USER: What is on the left? ASSISTANT:", "A chat about shapes.\nThe largest one is")
QUESTIONS = ("Describe this image in detail.", "What is on the right?")
PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {}\n{} ASSISTANT:"
)
Build = Annotated[str, typer.Option("--build", help="what is special about the installed llama.cpp")]
STEPS = 32  # tokens generated for each text prompt


def open_theirs(model: Path, mmproj: Path, prompt: str = "") -> Any:
    """Opens llama.cpp with float32 caches. `prompt`: a rendered chat with a picture, which contains `{image}`."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    class Handler(Llava15ChatHandler):
        DEFAULT_SYSTEM_MESSAGE = None
        CHAT_FORMAT = prompt.replace("{image}", "{{ messages[-1].content[0].image_url.url }}")

    made = Llama(
        str(model),
        n_ctx=1024,
        n_batch=1024,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=0,  # float32
        type_v=0,
        flash_attn=False,
        verbose=False,
        chat_handler=Handler(str(mmproj), verbose=False) if prompt else None,
    )
    return made


def text(theirs: Any, ours: Llava, assistant: Assistant, prompt: str) -> dict[str, Any]:
    """Continues one prompt with both models, ignoring end tokens."""
    ids = assistant.preprocessor.tokenizer.encode(prompt)
    same_ids = theirs.tokenize(prompt.encode(), add_bos=True, special=True) == ids
    found, margin, difference = (list(ids), list(ids)), float("inf"), 0.0
    theirs.reset()
    theirs.eval(ids)
    for _ in range(STEPS):
        logits = ours.decoder.logits(ours.decoder(ours.embed(torch.tensor(found[0]))[None]))
        mine, other = logits[0, -1], torch.from_numpy(np.array(theirs.scores[theirs.n_tokens - 1]))
        best = mine.topk(2).values
        margin = min(margin, float(best[0] - best[1]))
        difference = max(difference, float((mine - other).abs().max()))
        found[0].append(int(mine.argmax()))
        found[1].append(int(other.argmax()))
        theirs.eval(found[1][-1:])
    return {
        "prompt": prompt,
        "ids of the prompt are equal": same_ids,
        "equal tokens": sum(a == b for a, b in zip(found[0][len(ids) :], found[1][len(ids) :], strict=True)),
        "of": STEPS,
        "largest difference of logits": difference,
        "smallest margin of ours": margin,
        "text": assistant.preprocessor.tokenizer.decode(found[1][len(ids) :]),
    }


def as_url(picture: Image.Image) -> str:
    """Returns a picture as a PNG data URL."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def answer(theirs: Any, picture: Image.Image) -> str:
    """llama.cpp's greedy answer to the prompt that its handler was created with."""
    content = [{"type": "image_url", "image_url": {"url": as_url(picture)}}]
    reply = theirs.create_chat_completion(
        messages=[{"role": "user", "content": content}], temperature=0.0, repeat_penalty=1.0, max_tokens=128
    )
    return reply["choices"][0]["message"]["content"].strip()


def features(theirs: Any, picture: Image.Image) -> torch.Tensor:
    """The output of llama.cpp's tower and projector for a picture, [N, D]."""
    from llama_cpp import mtmd_cpp as mtmd

    context = theirs.chat_handler.mtmd_ctx
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB")))
    bitmap = mtmd.mtmd_bitmap_init(*picture.size, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    given = mtmd.mtmd_input_text()
    given.text = mtmd.mtmd_default_marker()
    given.text_len, given.add_special, given.parse_special = len(given.text), False, True
    chunks = mtmd.mtmd_input_chunks_init()
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(given), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
    every = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
    (chunk,) = (c for c in every if mtmd.mtmd_input_chunk_get_type(c) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)
    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
    size = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), theirs.n_embd())
    values = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), size).copy()
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    return torch.from_numpy(values)


def prepared(assistant: Assistant, file: Path) -> Image.Image:
    """A picture after our preprocessing, converted back to bytes."""
    image = assistant.config.image
    pixels = assistant.prepare(PROMPT.format("<image>", ""), images=[file]).pixels
    assert image is not None
    assert pixels is not None
    values = pixels[0].permute(1, 2, 0) * torch.tensor(image.std) + torch.tensor(image.mean)
    return Image.fromarray((255 * values).round().to(torch.uint8).numpy())


def picture(open_with: Any, assistant: Assistant, file: Path, question: str) -> dict[str, Any]:
    """Asks both models one question about one picture."""
    theirs = open_with(prompt=PROMPT.format("{image}", question))
    raw, small = Image.open(file).convert("RGB"), prepared(assistant, file)
    said = {"as it is": answer(theirs, raw), "prepared": answer(theirs, small)}
    mine = assistant.ask(file, question, temperature=0, max_new_tokens=128)
    pixels = assistant.prepare(PROMPT.format("<image>", question), images=[file]).pixels
    assert pixels is not None
    seen = {"as it is": features(theirs, raw), "prepared": features(theirs, small)}
    own = {name: features_of(assistant.model, pixels, last) for name, last in (("ours", False), ("class last", True))}
    return {
        "picture": file.name,
        "question": question,
        "ours": mine,
        "llama.cpp's": said,
        "equal": {name: text == mine for name, text in said.items()},
        "features differ, of their norm": {
            f"{name}, from {which}": float((one - other).norm() / other.norm())
            for name, one in seen.items()
            for which, other in own.items()
        },
    }


def features_of(model: Llava, pixels: torch.Tensor, class_last: bool) -> torch.Tensor:
    """Our features, [N, D]. `class_last`: appends the class token, but treats it as if it came first."""
    tower, projector = model.vision, model.projector
    assert tower is not None
    assert projector is not None
    parts = [tower.cls.expand(1, 1, -1), tower.patch(pixels)]
    x = tower.pre_norm(torch.cat(parts[::-1] if class_last else parts, dim=1) + tower.pos)
    for block in tower.blocks:
        x = block(x)
    return projector(x[:, 1:])[0]


@torch.inference_mode()
def main(out: Out = None, save: Save = False, commit: Commit = None, build_note: Build = "as released") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "gguf"
        convert(TINY, target, to="gguf", verify=True)
        open_with = partial(open_theirs, target / "model-f16.gguf", target / "mmproj-f16.gguf")
        assistant = llava.load(TINY, dtype="float32", device="cpu")
        ours = build(open_checkpoint(TINY, LoadOptions(vision=False)), dtype=torch.float32, device=torch.device("cpu"))
        bare = open_with()
        texts = [text(bare, ours, assistant, prompt) for prompt in TEXTS]
        pictures = [picture(open_with, assistant, file, question) for file in PICTURES for question in QUESTIONS]
    Result(
        benchmark="gguf-oracle-llava-tiny",
        question="Does llama.cpp compute with our GGUF of llava-tiny what we compute?",
        device="cpu",
        dtype="float16",
        settings={
            "llama-cpp-python": version("llama-cpp-python"),
            "build": build_note,
            "gguf": version("gguf"),
            "threads": 1,
        },
        seconds={},
        pairs=(),
        figures={"text": texts, "pictures": pictures},
        commit=commit,
    ).report(out, save)


def version(package: str) -> str:
    """The installed version of a package."""
    return importlib.metadata.version(package)


if __name__ == "__main__":
    typer.run(main)
