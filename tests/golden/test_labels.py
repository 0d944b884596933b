"""Labels, which are built span by span, equal the original's masks on the golden samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava.checkpoint.open import open_checkpoint
from llava.config import IMAGE, LoadOptions
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.conversation import Turn
from llava.preprocess.inputs import ModelInput, Preprocessor
from tests.golden.test_answers import FOLDERS, TOWERS

N_RUNS = 11  # runs of training.json; in the twelfth (MPT) the original masks everything by mistake, so f_mpt is used
TOKENIZERS = {
    "a": "a_v1.5/llava-v1.5-7b",
    "b": "b_llama2/llava-llama-2-13b-chat-lightning-preview",
    "c merged": "c_delta_v0/LLaVA-7b-delta-v0",
    "d merged": "d_delta_v1.1/LLaVA-Lightning-7B-delta-v1-1",
    "mpt": "f_mpt/LLaVA-Lightning-MPT-7B-preview",
}
NAMES = {"v1": "vicuna_v1"}


def prepare(golden: Path, checkpoints: Path, run: dict[str, Any], sample: dict[str, Any]) -> ModelInput:
    family = "b_llama2" if run["checkpoint"] == "b" else "a_v1.5"
    like = open_checkpoint(
        checkpoints / FOLDERS[family],
        LoadOptions(vision_tower=checkpoints / "vision" / TOWERS[family], fetch_tower=True),
    )
    decoder = replace(
        like.config.decoder, vocab_size=60_000
    )  # only the tokenizer and the number of image tokens matter
    config = replace(like.config, decoder=decoder, start_end=run["mm_use_im_start_end"])
    tokenizer = load_tokenizer(checkpoints / TOKENIZERS[run["checkpoint"]])
    preprocessor = Preprocessor(config, tokenizer, template=NAMES.get(run["template"], run["template"]))
    data = sample["data"]
    turns = [Turn("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in data["conversations"]]
    pictures = [golden / "images" / data["image"]] if "image" in data else []
    return preprocessor.prepare_training(turns, pictures, max_length=2048)


def as_the_original_counts(input: ModelInput) -> tuple[list[int], list[int]]:
    """Ids and labels with one token for each image."""
    ids, labels, seen = [], [], False
    for id, label in zip(input.ids.tolist(), input.labels.tolist(), strict=True):
        if id != IMAGE or not seen:
            ids.append(id)
            labels.append(label)
        seen = id == IMAGE
    return ids, labels


@pytest.mark.parametrize("number", range(N_RUNS))
def test_ids_and_labels_equal_the_originals(golden: Path, golden_checkpoints: Path, number: int) -> None:
    run = json.loads((golden / "training" / "training.json").read_text())["runs"][number]
    for sample in run["samples"]:
        ids, labels = as_the_original_counts(prepare(golden, golden_checkpoints, run, sample))
        if run["model_max_length"] < 2048 and "image" not in sample["data"]:
            ids, labels = ids[: run["model_max_length"]], labels[: run["model_max_length"]]
        assert ids == sample["input_ids"], sample["data"]
        assert labels == sample["labels"], sample["supervised_text"]


def test_mpt_ids_and_labels_equal_the_originals(golden: Path, golden_checkpoints: Path) -> None:
    run = json.loads((golden / "f_mpt" / "golden" / "training.json").read_text()) | {"checkpoint": "mpt"}
    for sample in run["samples"]:
        ids, labels = as_the_original_counts(prepare(golden, golden_checkpoints, run, sample))
        assert ids == sample["input_ids"], sample["data"]
        assert labels == sample["labels"], sample["supervised_text"]
