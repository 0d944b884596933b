"""Small benchmarks in the original's layouts, with replies and the figures that follow from them by hand."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.task import Data
from llava.eval.tasks import task_named

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Files of a task, and what is expected of it."""

    task: str
    files: Mapping[str, str]
    pictures: Mapping[str, str] = field(default_factory=dict)  # file of each question
    prompts: Mapping[str, str]  # by question
    replies: Mapping[str, str]
    figures: Mapping[str, float | None]  # all, and of each group
    value: float | None
    details: Mapping[str, float | None] = field(default_factory=dict)
    submission: Mapping[str, str] = field(default_factory=dict)  # text files for the benchmark's own programs
    split: str | None = None

    def write(self, root: Path) -> Data:
        """Writes the files below `root`, as below playground/data/eval, and returns where they are."""
        task = task_named(self.task)
        (root / task.folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            _put(root / task.folder / name, text.encode())
        for name in self.pictures.values():
            _put(root / task.folder / name, png(len(name)))
        return Data.of(task, root, split=self.split)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def png(shade: int) -> bytes:
    """A picture of 8 x 8 pixels."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 40, 200)).save(out, "png")
    return out.getvalue()


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def asked(id: int | str, image: str, text: str, **more: str) -> dict[str, Any]:
    """A question in LLaVA's layout."""
    return {"question_id": id, "image": image, "text": text, "category": "default", **more}


def annotated(*answers: str) -> list[dict[str, str]]:
    """The answers of ten annotators."""
    return [{"answer": answer, "answer_confidence": "yes"} for answer in answers]


# ---------------------------------------------------------------------------------------------------------------- POPE

_POPE = [
    ("random", "cat", "yes", "Yes"),
    ("random", "dog", "no", "Yes"),
    ("popular", "car", "no", "No"),
    ("popular", "hat", "yes", "No, there is not."),
    ("adversarial", "bus", "yes", "yes"),
    ("adversarial", "cup", "no", "no"),
]
POPE = Benchmark(
    task="pope",
    files={
        "llava_pope_test.jsonl": lines(
            *(
                asked(i, "a.png", f"Is there a {thing}?{SHORT}", category=split)
                for i, (split, thing, *_) in enumerate(_POPE)
            )
        ),
        **{
            f"coco/coco_pope_{split}.json": lines(
                *({"text": f"Is there a {thing}?", "label": label} for one, thing, label, _ in _POPE if one == split)
            )
            for split in ("random", "popular", "adversarial")
        },
    },
    pictures=dict.fromkeys(map(str, range(6)), "val2014/a.png"),
    prompts={str(i): f"Is there a {thing}?{SHORT}" for i, (_, thing, *_) in enumerate(_POPE)},
    replies={str(i): reply for i, (*_, reply) in enumerate(_POPE)},
    figures={"all": 200 / 3, "random": 200 / 3, "popular": 0.0, "adversarial": 100.0},
    value=(200 / 3 + 0 + 100) / 3,
    details={"accuracy": 400 / 6, "precision": 200 / 3, "recall": 200 / 3, "yes ratio": 50.0},
)

# ----------------------------------------------------------------------------------------------------------------- GQA

_GQA = {
    "201": ("Is it overcast?", "no", "verify", "No."),
    "202": ("What color is the sky?", "dark blue", "query", "Dark blue"),
    "203": ("Which animal is it?", "cat", "query", "a cat"),
}
GQA = Benchmark(
    task="gqa",
    files={
        "llava_gqa_testdev_balanced.jsonl": lines(*(asked(id, "n1.png", one[0] + SHORT) for id, one in _GQA.items())),
        "data/testdev_balanced_questions.json": json.dumps(
            {
                id: {"question": question, "answer": answer, "types": {"structural": kind}}
                for id, (question, answer, kind, _) in _GQA.items()
            }
        ),
    },
    pictures=dict.fromkeys(_GQA, "data/images/n1.png"),
    prompts={id: one[0] + SHORT for id, one in _GQA.items()},
    replies={id: one[3] for id, one in _GQA.items()},
    figures={"all": 200 / 3, "binary": 100.0, "verify": 100.0, "open": 50.0, "query": 50.0},
    value=200 / 3,
    submission={
        "testdev_balanced_predictions.json": json.dumps(
            [
                {"questionId": "201", "prediction": "no"},
                {"questionId": "202", "prediction": "dark blue"},
                {"questionId": "203", "prediction": "a cat"},
            ]
        )
    },
)

# --------------------------------------------------------------------------------------------------------------- VQAv2

_VQA = {7001: "Is it a dog?", 7002: "How many?", 7003: "What color?"}
_TEN = {
    7001: ("yes/no", ["yes"] * 10),
    7002: ("number", ["2", "two", *"abcdefgh"]),  # normalized, two of ten are 2
    7003: ("other", ["blue"] * 10),
}
VQAV2_VAL = Benchmark(
    task="vqav2",
    split="val",
    files={
        "v2_OpenEnded_mscoco_val2014_questions.json": json.dumps(
            {"questions": [{"image_id": 42, "question": text, "question_id": id} for id, text in _VQA.items()]}
        ),
        "v2_mscoco_val2014_annotations.json": json.dumps(
            {
                "annotations": [
                    {"question_id": id, "image_id": 42, "answer_type": kind, "answers": annotated(*answers)}
                    for id, (kind, answers) in _TEN.items()
                ]
            }
        ),
    },
    pictures=dict.fromkeys(map(str, _VQA), "val2014/COCO_val2014_000000000042.jpg"),
    prompts={str(id): text + SHORT for id, text in _VQA.items()},
    replies={"7001": "Yes.", "7002": "Two", "7003": "red"},
    figures={"all": 160 / 3, "yes/no": 100.0, "number": 60.0, "other": 0.0},
    value=160 / 3,
)
VQAV2_TEST = Benchmark(
    task="vqav2",
    files={
        "llava_vqav2_mscoco_test-dev2015.jsonl": lines(
            asked(5, "a.jpg", f"Who?{SHORT}"), asked(7, "b.jpg", f"Why?{SHORT}")
        ),
        "llava_vqav2_mscoco_test2015.jsonl": lines(*(asked(id, "a.jpg", "What?") for id in (5, 6, 7))),
    },
    pictures={"5": "test2015/a.jpg", "7": "test2015/b.jpg"},
    prompts={"5": f"Who?{SHORT}", "7": f"Why?{SHORT}"},
    replies={"5": "The two men.", "7": "Dont know"},
    figures={"all": None},
    value=None,
    submission={
        "submission.json": json.dumps(
            [
                {"question_id": 5, "answer": "2 men"},
                {"question_id": 6, "answer": ""},
                {"question_id": 7, "answer": "don't know"},
            ]
        )
    },
)

# -------------------------------------------------------------------------------------------------------------- VizWiz

_UNSURE = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
VIZWIZ_VAL = Benchmark(
    task="vizwiz",
    split="val",
    files={
        "val.json": json.dumps(
            [
                {
                    "image": "v0.jpg",
                    "question": "What is this?",
                    "answers": annotated(*["soda"] * 3, *["coke can"] * 7),
                    "answer_type": "other",
                },
                {
                    "image": "v1.jpg",
                    "question": "What does it say?",
                    "answers": annotated(*["unanswerable"] * 10),
                    "answer_type": "unanswerable",
                },
            ]
        )
    },
    pictures={"v0.jpg": "val/v0.jpg", "v1.jpg": "val/v1.jpg"},
    prompts={"v0.jpg": f"What is this?{_UNSURE}", "v1.jpg": f"What does it say?{_UNSURE}"},
    replies={"v0.jpg": "Soda", "v1.jpg": "Unanswerable"},
    figures={"all": 95.0, "other": 90.0, "unanswerable": 100.0},
    value=95.0,
)
VIZWIZ_TEST = Benchmark(
    task="vizwiz",
    files={"llava_test.jsonl": lines(asked(0, "VizWiz_test_0.jpg", f"What is this?{_UNSURE}"))},
    pictures={"0": "test/VizWiz_test_0.jpg"},
    prompts={"0": f"What is this?{_UNSURE}"},
    replies={"0": "A bottle, I think."},
    figures={"all": None},
    value=None,
    submission={"submission.json": json.dumps([{"image": "VizWiz_test_0.jpg", "answer": "bottle i think"}])},
)

# ------------------------------------------------------------------------------------------------------------- TextVQA

_TEXTVQA = [
    ("ab12", f"What is the Brand?\nReference OCR token: ACME, 5{SHORT}"),
    ("ab12", f"what year is it?{SHORT}"),
    ("cd34", f"Reference OCR token: STOP\nWhat does it say?{SHORT}"),
    ("cd34", "OCR tokens: a; b. Question: which color? Short answer:"),
]
_TEXTVQA_ANSWERS = [
    ("ab12", "what is the brand?", ["acme"] * 10),
    ("ab12", "What year is it?", ["1999"] * 2 + ["unknown"] * 8),
    ("cd34", "what does it say?", ["stop"] * 4 + ["go"] * 6),
    ("cd34", "which color?", ["red"] * 10),
]
TEXTVQA = Benchmark(
    task="textvqa",
    files={
        "llava_textvqa_val_v051_ocr.jsonl": lines(*(asked(id, f"{id}.jpg", text) for id, text in _TEXTVQA)),
        "TextVQA_0.5.1_val.json": json.dumps(
            {
                "dataset_type": "val",
                "data": [
                    {"question_id": 34602 + i, "image_id": id, "question": question, "answers": answers}
                    for i, (id, question, answers) in enumerate(_TEXTVQA_ANSWERS)
                ],
            }
        ),
    },
    pictures={
        "ab12:1": "train_images/ab12.jpg",
        "ab12:2": "train_images/ab12.jpg",
        "cd34:1": "train_images/cd34.jpg",
        "cd34:2": "train_images/cd34.jpg",
    },
    prompts=dict(zip(("ab12:1", "ab12:2", "cd34:1", "cd34:2"), (text for _, text in _TEXTVQA), strict=True)),
    replies={"ab12:1": "Acme.", "ab12:2": "1999", "cd34:1": "STOP", "cd34:2": "blue"},
    figures={"all": 65.0},  # 1, 0.6, 1 and 0
    value=65.0,
    submission={
        "eval_textvqa.jsonl": lines(
            *(
                {"question_id": id, "prompt": text, "text": reply}
                for (id, text), reply in zip(_TEXTVQA, ("Acme.", "1999", "STOP", "blue"), strict=True)
            )
        )
    },
)

# ----------------------------------------------------------------------------------------------------------------- MME

_ASKS = "Please answer yes or no."
MME = Benchmark(
    task="mme",
    files={
        "llava_mme.jsonl": lines(
            asked("existence/1.png", "existence/1.png", f"Is there a cat? {_ASKS}{SHORT}"),
            asked("existence/1.png", "existence/1.png", f"Is there a dog? {_ASKS}{SHORT}"),
            asked("existence/2.png", "existence/2.png", f"Is there a car? {_ASKS}{SHORT}"),
            asked("existence/2.png", "existence/2.png", f"Is there a bus?{SHORT}"),
            asked("artwork/9.png", "artwork/images/9.png", f"Is it a Monet? {_ASKS}{SHORT}"),
            asked("artwork/9.png", "artwork/images/9.png", f"Is it a Manet?{SHORT}"),
            asked("code_reasoning/3.png", "code_reasoning/3.png", f"Is it C? {_ASKS}{SHORT}"),
            asked("code_reasoning/3.png", "code_reasoning/3.png", f"Is it Go? {_ASKS}{SHORT}"),
        ),
        **{
            f"MME_Benchmark_release_version/{name}": text
            for name, text in {
                "existence/1.txt": f"Is there a cat? {_ASKS}\tYes\nIs there a dog? {_ASKS}\tNo\n",
                "existence/2.txt": f"Is there a car? {_ASKS}\tYes\nIs there a bus? {_ASKS}\tNo",
                "artwork/questions_answers_YN/9.txt": f"Is it a Monet? {_ASKS}\tYes\nIs it a Manet?  {_ASKS}\tNo\n",
                "code_reasoning/3.txt": f"Is it C? {_ASKS}\tYes\nIs it Go? {_ASKS}\tNo\n",
            }.items()
        },
    },
    pictures={
        f"{picture}:{n}": f"MME_Benchmark_release_version/{file}"
        for picture, file in {
            "existence/1": "existence/1.png",
            "existence/2": "existence/2.png",
            "artwork/9": "artwork/images/9.png",
            "code_reasoning/3": "code_reasoning/3.png",
        }.items()
        for n in (1, 2)
    },
    prompts={
        "existence/1:1": f"Is there a cat? {_ASKS}{SHORT}",
        "existence/1:2": f"Is there a dog? {_ASKS}{SHORT}",
        "existence/2:1": f"Is there a car? {_ASKS}{SHORT}",
        "existence/2:2": f"Is there a bus?{SHORT}",
        "artwork/9:1": f"Is it a Monet? {_ASKS}{SHORT}",
        "artwork/9:2": f"Is it a Manet?{SHORT}",
        "code_reasoning/3:1": f"Is it C? {_ASKS}{SHORT}",
        "code_reasoning/3:2": f"Is it Go? {_ASKS}{SHORT}",
    },
    replies={
        "existence/1:1": "Yes",
        "existence/1:2": "No",
        "existence/2:1": "Yes",
        "existence/2:2": "Yes\tit\nis",
        "artwork/9:1": "yes.",
        "artwork/9:2": "No",
        "code_reasoning/3:1": "Maybe",
        "code_reasoning/3:2": "no",
    },
    figures={
        "all": 375.0,
        "perception": 325.0,
        "existence": 125.0,  # 3 of 4 answers, 1 of 2 pictures
        "artwork": 200.0,
        "cognition": 50.0,
        "code_reasoning": 50.0,
    },
    value=325.0,
    submission={
        "eval_tool/existence.txt": (
            f"1.txt\tIs there a cat? {_ASKS}\tYes\tYes\n1.txt\tIs there a dog? {_ASKS}\tNo\tNo\n"
            f"2.txt\tIs there a car? {_ASKS}\tYes\tYes\n2.txt\tIs there a bus? {_ASKS}\tNo\tYes it is\n"
        ),
        "eval_tool/artwork.txt": f"9.txt\tIs it a Monet? {_ASKS}\tYes\tyes.\n9.txt\tIs it a Manet?  {_ASKS}\tNo\tNo\n",
        "eval_tool/code_reasoning.txt": f"3.txt\tIs it C? {_ASKS}\tYes\tMaybe\n3.txt\tIs it Go? {_ASKS}\tNo\tno\n",
    },
)

# -------------------------------------------------------------------------------------------------------------- MMBench

_COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]
_EMBEDDED = base64.b64encode(png(7)).decode()


def mmbench_rows(*rows: Mapping[str, Any], without: tuple[str, ...] = ()) -> str:
    """A tab-separated file, in which cells with quotes or line breaks are quoted."""
    names = [name for name in _COLUMNS if name not in without]
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    quoted = [
        ['"' + cell.replace('"', '""') + '"' if set(cell) & set('"\n') else cell for cell in row] for row in cells
    ]
    return "".join("\t".join(row) + "\n" for row in quoted)


def _row(index: int, question: str, *options: str, **more: str) -> dict[str, Any]:
    given = dict(zip("ABCD", options, strict=False))
    return {"index": index, "question": question, **given, "image": _EMBEDDED, "split": "dev", **more}


_COLOR = {"category": "color", "l2-category": "finegrained"}
MMBENCH_DEV = Benchmark(
    task="mmbench",
    files={
        "mmbench_dev_20230712.tsv": mmbench_rows(
            _row(8, "Which one?", "a cat", "a dog", hint='It says "wuff".\nListen.', answer="B", **_COLOR),
            _row(
                9, "What color?", "red", "blue", "None", "green", answer="A", category="color"
            ),  # None ends the options
            _row(1_000_008, "Which one?", "a dog", "a cat", hint="nan", answer="A", **_COLOR),
            _row(1_000_009, "What color?", "blue", "red", answer="B", category="color"),
        )
    },
    prompts={
        "8": f'It says "wuff".\nListen.\nWhich one?\nA. a cat\nB. a dog{LETTER}',
        "9": f"What color?\nA. red\nB. blue{LETTER}",
        "1000008": f"Which one?\nA. a dog\nB. a cat{LETTER}",
        "1000009": f"What color?\nA. blue\nB. red{LETTER}",
    },
    replies={"8": "B", "9": "red", "1000008": "A. a dog", "1000009": "A"},
    figures={"all": 50.0, "finegrained": 100.0, "color": 50.0},
    value=50.0,
    details={"each rotation": 75.0},
)
MMBENCH_TEST = Benchmark(
    task="mmbench",
    split="test_20230712",
    files={"mmbench_test_20230712.tsv": mmbench_rows(_row(1, "Which?", "x", "y"), without=("answer", "comment"))},
    prompts={"1": f"Which?\nA. x\nB. y{LETTER}"},
    replies={"1": "B"},
    figures={"all": None},
    value=None,
)
MMBENCH_CN = Benchmark(
    task="mmbench",
    split="dev_cn_20231003",
    files={"mmbench_dev_cn_20231003.tsv": mmbench_rows(_row(1, "哪个?", "猫", "狗", answer="B"))},
    prompts={"1": "哪个?\nA. 猫\nB. 狗\n请直接回答选项字母。"},
    replies={"1": "B"},
    figures={"all": 100.0},
    value=100.0,
    details={"each rotation": 100.0},
)

# ---------------------------------------------------------------------------------------------------------------- SEED

_SEED = f"Who is it?\nA. a\nB. b\nC. c\nD. d{LETTER}"
_SEED_FILES = {
    "llava-seed-bench.jsonl": lines(
        asked(101, "SEED-Bench-image/1_2", _SEED),
        asked(102, "SEED-Bench-image/3_4", _SEED),
        asked("v103", "SEED-Bench-video-image/v.png", _SEED),
    ),
    "SEED-Bench.json": json.dumps(
        {
            "question_type": {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10},
            "questions": [
                {"question_id": "101", "answer": "A", "question_type_id": 1, "data_type": "image"},
                {"question_id": "102", "answer": "C", "question_type_id": 2, "data_type": "image"},
                {"question_id": "v103", "answer": "D", "question_type_id": 10, "data_type": "video"},
            ],
        }
    ),
}
SEED = Benchmark(
    task="seed",
    files=_SEED_FILES,
    pictures={"101": "SEED-Bench-image/1_2", "102": "SEED-Bench-image/3_4"},
    prompts={"101": _SEED, "102": _SEED},
    replies={"101": "A", "102": "C."},  # the original wants the letter only
    figures={"all": 50.0, "image": 50.0, "Scene Understanding": 100.0, "Instance Identity": 0.0},
    value=50.0,
    submission={
        "submission.jsonl": lines({"question_id": "101", "prediction": "A"}, {"question_id": "102", "prediction": "C."})
    },
)
SEED_ALL = Benchmark(
    task="seed",
    split="all",
    files=_SEED_FILES,
    pictures={**SEED.pictures, "v103": "SEED-Bench-video-image/v.png"},
    prompts={**SEED.prompts, "v103": _SEED},
    replies={**SEED.replies, "v103": "D"},
    figures={**SEED.figures, "all": 200 / 3, "video": 100.0, "Action Recognition": 100.0},
    value=200 / 3,
    submission={
        "submission.jsonl": SEED.submission["submission.jsonl"] + lines({"question_id": "v103", "prediction": "D"})
    },
)

# -------------------------------------------------------------------------------------------------------------- MM-Vet

MM_VET = Benchmark(
    task="mm-vet",
    files={"llava-mm-vet.jsonl": lines(asked(0, "v1_0.png", "What is x?"), asked(1, "v1_1.png", "Tell me a story."))},
    pictures={"0": "images/v1_0.png", "1": "images/v1_1.png"},
    prompts={"0": "What is x?", "1": "Tell me a story."},
    replies={"0": "-1 or -5", "1": "Es war einmal … ä"},
    figures={"all": None},
    value=None,
    submission={"submission.json": json.dumps({"v1_0": "-1 or -5", "v1_1": "Es war einmal … ä"}, indent=2)},
)

# ----------------------------------------------------------------------------------------------------------- ScienceQA


def _problem(answer: int, *, hint: str = "", image: str | None = None, subject: str, grade: str) -> dict[str, Any]:
    given = {"hint": hint, "image": image, "subject": subject, "grade": grade, "lecture": "", "solution": ""}
    return {"question": "Which?", "choices": ["x", "y"], "answer": answer, **given}


_PROBLEMS = {
    "4": _problem(1, hint="Look.", image="image.png", subject="natural science", grade="grade3"),
    "5": _problem(0, subject="social science", grade="grade8"),
    "6": _problem(0, image="image.png", subject="natural science", grade="grade7"),
}
_CQM = "Context: {}\nQuestion: Which?\nOptions: (A) x (B) y"
_SCIENCE_PROMPTS = {
    "4": _CQM.format("Look.") + LETTER,
    "5": _CQM.format("N/A") + LETTER,
    "6": _CQM.format("N/A") + LETTER,
}
_SCIENCE_FILES = {
    "problems.json": json.dumps(_PROBLEMS),
    "pid_splits.json": json.dumps({"test": ["4", "5", "6"], "minitest": ["5", "6"]}),
}
SCIENCEQA_MADE = Benchmark(
    task="scienceqa",
    split="minitest",
    files=_SCIENCE_FILES,
    pictures={"6": "images/test/6/image.png"},
    prompts={id: _SCIENCE_PROMPTS[id] for id in ("5", "6")},
    replies={"5": "The answer is A.", "6": "C"},
    figures={"all": 50.0, "NO": 100.0, "SOC": 100.0, "G7-12": 50.0, "IMG": 0.0, "NAT": 0.0, "image": 0.0},
    value=50.0,
)
SCIENCEQA = Benchmark(
    task="scienceqa",
    files=_SCIENCE_FILES
    | {
        "llava_test_CQM-A.json": json.dumps(
            [
                {
                    "id": id,
                    **({"image": f"{id}/image.png"} if problem["image"] else {}),
                    "conversations": [
                        {
                            "from": "human",
                            "value": _CQM.format(problem["hint"] or "N/A") + "\n<image>" * bool(problem["image"]),
                        },
                        {"from": "gpt", "value": "The answer is B."},
                    ],
                }
                for id, problem in _PROBLEMS.items()
            ]
        )
    },
    pictures={"4": "images/test/4/image.png", "6": "images/test/6/image.png"},
    prompts=_SCIENCE_PROMPTS,
    replies={"4": "B", "5": "B. y", "6": "A"},
    figures={
        "all": 200 / 3,
        "TXT": 100.0,
        "IMG": 100.0,
        "NAT": 100.0,
        "G1-6": 100.0,
        "image": 100.0,
        "NO": 0.0,
        "SOC": 0.0,
        "G7-12": 50.0,
    },
    value=200 / 3,
)

BENCHMARKS = {
    "pope": POPE,
    "gqa": GQA,
    "vqav2 test-dev": VQAV2_TEST,
    "vqav2 val": VQAV2_VAL,
    "vizwiz test": VIZWIZ_TEST,
    "vizwiz val": VIZWIZ_VAL,
    "textvqa": TEXTVQA,
    "mme": MME,
    "mmbench dev": MMBENCH_DEV,
    "mmbench test": MMBENCH_TEST,
    "mmbench dev in Chinese": MMBENCH_CN,
    "seed": SEED,
    "seed all": SEED_ALL,
    "mm-vet": MM_VET,
    "scienceqa": SCIENCEQA,
    "scienceqa minitest": SCIENCEQA_MADE,
}
