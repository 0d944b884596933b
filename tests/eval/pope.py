"""A small POPE in the layout of the original, and what a model would get that always says yes."""

import json
from pathlib import Path

from PIL import Image

SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."


def write_pope(folder: Path, per_split: int = 4) -> Path:
    """Writes questions about two pictures, of which every second one has the label yes. Returns the folder."""
    pictures = folder / "pope" / "val2014"
    pictures.mkdir(parents=True)
    (folder / "pope" / "coco").mkdir()
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(pictures / name)
    questions = []
    for split in SPLITS:
        labels = []
        for i in range(per_split):
            label, text = "no" if i % 2 else "yes", f"Is there a thing {i} in the image?"
            picture = ("red.png", "blue.png")[i // 2 % 2]
            labels.append({"question_id": i + 1, "image": picture, "text": text, "label": label})
            question = {"question_id": len(questions) + 1, "image": picture, "text": text + SUFFIX, "category": split}
            questions.append(question)
        (folder / "pope" / "coco" / f"coco_pope_{split}.json").write_text(lines(labels))
    (folder / "pope" / "llava_pope_test.jsonl").write_text(lines(questions))
    return folder


def lines(values: list[dict[str, object]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values)
