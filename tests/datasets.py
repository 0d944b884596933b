"""Generated training data in the published formats, at the paths that the shipped recipes name."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import tiny

N = 8  # samples per file
LINES = [line for line in tiny.TEXT.splitlines() if line]
Json = dict[str, Any]


def conversation(*turns: str) -> list[Json]:
    """Alternating questions and answers."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def marked(i: int, question: str) -> str:
    """Puts the mark before or after the question, on its own line."""
    return f"{question}\n<image>" if i % 2 else f"<image>\n{question}"


def captions(choose: random.Random, i: int) -> Json:
    """LCS-558K."""
    question = marked(i, "Render a clear and concise summary of the photo.")
    return {
        "id": f"{i:09}",
        "image": f"{i % 100:05}/{i:09}.jpg",
        "conversations": conversation(question, choose.choice(LINES)[:40]),
    }


def raw_captions(choose: random.Random, i: int) -> Json:
    """CC-595K."""
    question = "Provide a brief description of the given image.\n<image>"
    name = f"GCC_train_{i:09}"
    return {
        "id": name,
        "image": f"{name}.jpg",
        "conversations": conversation(question, choose.choice(LINES)[:40].lower()),
    }


def instructions(choose: random.Random, i: int) -> Json:
    """LLaVA-Instruct: conversations of several turns, single long answers, and COCO names without a folder."""
    turns = [marked(i, "What is in the picture?"), choose.choice(LINES)]
    if i % 3:
        turns += ["Which colours do you see?", choose.choice(LINES)[:50]]
    return {"id": f"{i:012}", "image": f"{i:012}.jpg", "conversations": conversation(*turns)}


def mixture(choose: random.Random, i: int) -> Json:
    """mix665k: several short answers per sample, pictures from five folders, and some text-only samples."""
    if i % 4 == 3:
        return {
            "id": f"text{i}",
            "conversations": conversation("Say hello.", choose.choice(LINES), "Why?", "No."),
        }
    short = "Answer the question using a single word or phrase."
    folder = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")[i % 5]
    turns = [f"<image>\nHow many people are there?\n{short}", "3", "Which one is darker?", "Left"]
    return {"id": i, "image": f"{folder}/{i:012}.jpg", "conversations": conversation(*turns)}


def science(answer: str) -> Callable[[random.Random, int], Json]:
    """ScienceQA: if there is a picture, its mark comes last."""

    def sample(choose: random.Random, i: int) -> Json:
        question = "Which is the darker one?\nContext: N/A\nOptions: (A) the left (B) the right"
        made = {
            "id": str(i),
            "conversations": conversation(question, answer.format(choose.choice(LINES), choose.choice("AB"))),
        }
        if i % 2:
            made |= {"image": f"{i}/image.png"}
            made["conversations"][0]["value"] += "\n<image>"
        return made

    return sample


def own(choose: random.Random, i: int) -> Json:
    """A user's own data, also used for llava-tiny."""
    return {
        "id": f"own-{i}",
        "image": f"own-{i}.jpg",
        "conversations": conversation("<image>\nRead it.", choose.choice(LINES)),
    }


FORMATS: dict[str, Callable[[random.Random, int], Json]] = {
    "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": captions,
    "data/LLaVA-CC3M-Pretrain-595K/chat.json": raw_captions,
    "data/llava_instruct_150k.json": instructions,
    "data/llava_instruct_80k.json": instructions,
    "data/llava_v1_5_mix665k.json": mixture,
    "data/llava_v1_6_mix.json": mixture,
    "data/scienceqa/llava_train_QCM-LEPA.json": science("LECTURE: {}\n###\nANSWER: {}."),
    "data/scienceqa/llava_train_QCM-LEA.json": science("{} The answer is {}."),
    "data/custom.json": own,
    "build/tiny/caption/data.json": own,
    "build/tiny/instruct/data.json": own,
    "build/tiny/fresh/data.json": own,
}


def write(file: str, images: str) -> None:
    """Writes a data file in the working folder, and its pictures to a folder or .tar."""
    choose = random.Random(file)
    samples = [FORMATS[file](choose, i) for i in range(N)]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(samples))
    pictures = {sample["image"]: picture(i) for i, sample in enumerate(samples) if "image" in sample}
    if images.endswith(".tar"):
        with tarfile.open(images, "w") as tar:
            for name, data in pictures.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return
    for name, data in pictures.items():
        path = Path(images, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def picture(i: int) -> bytes:
    """Noise in varying sizes, as PNG or JPEG regardless of the file name."""
    out = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (30 + 9 * i, 90 - 7 * i, 3), np.uint8)
    Image.fromarray(noise).save(out, "PNG" if i % 2 else "JPEG")
    return out.getvalue()
