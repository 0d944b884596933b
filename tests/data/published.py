"""Small samples in the format of every published data set, and writers of data files and picture stores."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.layouts import Sample
from llava.preprocess.conversation import Turn

SHORT = "\nAnswer the question using a single word or phrase."


OPTIONS = "Options: (A) yes (B) no"


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


LCS = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": talk("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture 3"),
    },
    {"id": "002239345", "image": "00223/002239345.jpg", "conversations": talk("<image>\nWhat is this?", "a dog | cat")},
]


CC = [
    {
        "id": "GCC_train_002582585",
        "image": "GCC_train_002582585.jpg",
        "conversations": talk(
            "Provide a brief description of the given image.\n<image>", "olive oil is a healthy one ."
        ),
    }
]


INSTRUCT = [
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": talk(
            "<image>\nWhat are the colors of the bus?", "White and red.", "Where is it?", "In a bay."
        ),
    },
    {"id": "000000033471", "image": "000000033471.jpg", "conversations": talk("Describe it.\n<image>", "A bus – old.")},
]


MIX = [
    *({**sample, "image": f"coco/train2017/{sample['image']}"} for sample in INSTRUCT),
    {"id": "2354786", "image": "gqa/images/2354786.jpg", "conversations": talk(f"<image>\nIs it red?{SHORT}", "No")},
    {"id": "wgByO4Y_0", "model": "", "conversations": talk("Wie heißt du? 你好 \U0001f642", "Ich bin ein Modell.")},
    {
        "id": "0321713",
        "image": "ocr_vqa/images/0321713.jpg",
        "conversations": talk("<image>\nTitle?", "Dune", "By?", "H"),
    },
    {"id": "a1", "image": "textvqa/train_images/a1.jpg", "conversations": talk("<image>\nCaption?", "A sign.")},
    {"id": "5", "image": "vg/VG_100K/5.jpg", "conversations": talk("<image>\nRegion?", "[0.1, 0.2, 0.3, 0.4]")},
    {"id": "6", "image": "vg/VG_100K_2/6.jpg", "conversations": talk("<image>\nRegion?", "A hat")},
]


SQA = [
    {
        "id": "1",
        "image": "1/image.png",
        "conversations": talk(f"Context: N/A\nWhich?\n{OPTIONS}\n<image>", "LECTURE: L\n\n###\nANSWER: A."),
    },
    {"id": "2", "image": None, "conversations": talk(f"Context: hot\nIs it?\n{OPTIONS}", "The answer is B.")},
    {"id": 3, "conversations": talk(f"Context: cold\nIs it?\n{OPTIONS}", "The answer is A.")},
]


SETS = {"lcs558k": LCS, "cc595k": CC, "instruct": INSTRUCT, "mix665k": MIX, "scienceqa": SQA}


SEVERAL = [{"id": "s", "image": ["a.png", "b.png"], "conversations": talk("<image> or <image>?", "The first.")}]


GOOD = talk("<image>\nq", "a")


def picture(name: str) -> bytes:
    out = io.BytesIO()
    noise = Image.frombytes("RGB", (12, 8), random.Random(name).randbytes(12 * 8 * 3))
    noise.save(out, "PNG" if name.endswith(".png") else "JPEG")
    return out.getvalue()


def names_of(data: list[dict[str, Any]]) -> list[str]:
    images = [sample.get("image") for sample in data]
    flat = [name for image in images for name in (image if isinstance(image, list) else [image])]
    return sorted({name for name in flat if name})


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(file: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for i, (name, data) in enumerate(files.items()):
            archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return file


def write_tar(file: Path, files: Mapping[str, bytes], dot: str = "") -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(dot + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def write_shards(root: Path, files: Mapping[str, bytes]) -> Path:
    root.mkdir()
    items = list(files.items())
    for i in range(2):
        write_tar(root / f"{i:05}.tar", dict(items[i::2]), dot="./")
    return root


def store(kind: str, root: Path, files: Mapping[str, bytes]) -> Path:
    match kind:
        case "folder":
            return write_folder(root / "images", files)
        case "zip":
            return write_zip(root / "images.zip", files)
        case "tar":
            return write_tar(root / "images.tar", files)
    return write_shards(root / "shards", files)


def write_json(file: Path, data: Any, **options: Any) -> Path:
    file.write_text(json.dumps(data, **options), encoding="utf-8")
    return file


def write_lines(file: Path, data: list[Any]) -> Path:
    file.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in data), encoding="utf-8")
    return file


def webdataset(data: list[dict[str, Any]]) -> dict[str, bytes]:
    """The members of a tar with KEY.json and KEY.jpg per sample. The JSON has no id and no image."""
    files = {}
    for i, sample in enumerate(data):
        bare = {key: value for key, value in sample.items() if key not in ("id", "image")}
        files[f"{i:06}.json"] = json.dumps(bare).encode()
        for j, name in enumerate(names_of([sample])):
            files[f"{i:06}.{j}.jpg" if j else f"{i:06}.jpg"] = picture(name)
    return files


def expected(data: list[dict[str, Any]]) -> list[Sample]:
    """The samples that the data should be read as."""
    out = []
    for sample in data:
        roles = {"human": "user", "gpt": "assistant"}
        turns = tuple(Turn(roles[turn["from"]], turn["value"]) for turn in sample["conversations"])
        image = sample.get("image")
        images = tuple(image) if isinstance(image, list) else (image,) if image else ()
        out.append(Sample(str(sample["id"]), turns, images))
    return out
