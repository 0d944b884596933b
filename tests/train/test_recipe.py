"""The shipped recipes: each matches its zoo entry, runs on data in the published format, and trains exactly the stated
parts. Recipes contain relative paths, so the tests run in a folder that holds small versions of those files."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llava
from llava.checkpoint.open import open_checkpoint
from llava.cli import main
from llava.config import LoadOptions
from llava.errors import ConfigError, LlavaError
from llava.formats.format import Checkpoint
from llava.model.llava import Llava
from llava.train import loop, run
from llava.train.plan import make_plan
from llava.train.recipe import (
    RECIPES,
    RENAMED,
    Recipe,
    changed_keys,
    read_recipe,
    recipe_from,
    recipe_names,
    to_dict,
)
from llava.train.run_folder import check_folder
from tests import datasets, tiny
from tests.command import run_well

NAMES = recipe_names()
OTHERS = {"custom", "llava-tiny"}  # folders without an entry in the zoo

# -------------------------------------------------------------------------------------- compared with the zoo

H = "liuhaotian/"
ROWS = {
    f"{H}LLaVA-7b-delta-v0": "llava-v0-7b/finetune",
    f"{H}LLaVA-13b-delta-v0": "llava-v0-13b/finetune",
    f"{H}LLaVA-13b-delta-v0-science_qa": "llava-v0-13b-scienceqa/finetune",
    f"{H}LLaVA-13b-delta-v1-1": "llava-v1.1-13b/finetune",
    f"{H}LLaVA-Lightning-7B-delta-v1-1": "llava-lightning-7b/finetune",
    f"{H}LLaVA-Lightning-MPT-7B-preview": "llava-lightning-mpt-7b/finetune",
    f"{H}llava-v1-0719-336px-lora-vicuna-13b-v1.3": "llava-v1-13b-336px/finetune-lora",
    f"{H}llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3": "llava-v1-13b-336px/finetune-lora",
    f"{H}llava-llama-2-13b-chat-lightning-preview": "llava-llama-2-13b/finetune",
    f"{H}llava-llama-2-7b-chat-lightning-lora-preview": "llava-llama-2-7b/finetune-lora",
    f"{H}llava-lcs558k-scienceqa-vicuna-13b-v1.3": "llava-v1-13b-scienceqa/finetune",
    f"{H}llava-v1.5-7b": "llava-v1.5/finetune",
    f"{H}llava-v1.5-13b": "llava-v1.5-13b/finetune",
    f"{H}llava-v1.5-7b-lora": "llava-v1.5/finetune-lora",
    f"{H}llava-v1.5-13b-lora": "llava-v1.5-13b/finetune-lora",
    f"{H}llava-v1.6-vicuna-7b": "llava-v1.6-vicuna-7b/finetune",
    f"{H}llava-v1.6-vicuna-13b": "llava-v1.6-vicuna-13b/finetune",
    f"{H}llava-v1.6-mistral-7b": "llava-v1.6-mistral-7b/finetune",
    f"{H}llava-v1.6-34b": "llava-v1.6-34b/finetune",
    f"{H}llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5": "llava-v1.5/pretrain",
    f"{H}llava-v1.5-mlp2x-336px-pretrain-vicuna-13b-v1.5": "llava-v1.5-13b/pretrain",
    f"{H}llava-336px-pretrain-llama-2-13b-chat": "llava-llama-2-13b-336px/pretrain",
    f"{H}llava-336px-pretrain-llama-2-7b-chat": "llava-llama-2-7b-336px/pretrain",
    f"{H}llava-pretrain-llama-2-13b-chat": "llava-llama-2-13b/pretrain",
    f"{H}llava-pretrain-llama-2-7b-chat": "llava-llama-2-7b/pretrain",
    f"{H}llava-336px-pretrain-vicuna-13b-v1.3": "llava-v1-13b-336px/pretrain",
    f"{H}llava-336px-pretrain-vicuna-7b-v1.3": "llava-v1-7b-336px/pretrain",
    f"{H}llava-pretrain-vicuna-13b-v1.3": "llava-v1-13b/pretrain",
    f"{H}llava-pretrain-vicuna-7b-v1.3": "llava-v1-7b/pretrain",
    f"{H}LLaVA-Pretrained-Projectors#LLaVA-7b-pretrain-projector-v1-1-LCS-558K-blip_caption.bin": (
        "llava-lightning-7b/pretrain"
    ),
    f"{H}LLaVA-Pretrained-Projectors#LLaVA-13b-pretrain-projector-v0-CC3M-595K-original_caption.bin": (
        "llava-v0-13b/pretrain"
    ),
    f"{H}LLaVA-Pretrained-Projectors#LLaVA-7b-pretrain-projector-v0-CC3M-595K-original_caption.bin": (
        "llava-v0-7b/pretrain"
    ),
    f"{H}LLaVA-Pretrained-Projectors#LLaVA-13b-pretrain-projector-v0-CC3M-595K-original_caption-no_im_token.bin": (
        "llava-v0-13b-scienceqa/pretrain"
    ),
}
FILES = {  # name of a data set in the zoo -> file
    "LCS-558K": "blip_laion_cc_sbu_558k.json",
    "CC-595K": "chat.json",
    "LLaVA-Instruct-158K": "llava_instruct_150k.json",
    "LLaVA-Instruct-80K": "llava_instruct_80k.json",
    "llava_v1_5_mix665k": "llava_v1_5_mix665k.json",
    "158K GPT instruct + 500K academic VQA + 50K GPT-4V + 40K ShareGPT (model card)": "llava_v1_6_mix.json",
}
SCIENCE = {
    "v0-delta-scienceqa": "llava_train_QCM-LEPA.json",
    "scienceqa-v1.3": "llava_train_QCM-LEA.json",
}


@pytest.fixture(scope="session")
def zoo(shared: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads((shared / "reference" / "zoo.json").read_text())["entries"]}


def pretraining(recipe: Recipe) -> Recipe:
    """The recipe that trains the projector this one starts from."""
    assert recipe.projector
    return read_recipe(recipe.projector.removeprefix("runs/").removesuffix("/model"))


def template_of(row: dict[str, Any]) -> str:
    named = row["conversation"]["train"]
    if named.startswith("v0/v1"):
        return "llava_v0" if row["base_llm"].endswith("v0") else "vicuna_v1"
    return "llava_v0" if named.startswith("v0 ") else named.split()[0]


def test_every_entry_of_the_zoo_has_a_recipe_and_every_folder_an_entry(zoo: dict[str, Any]) -> None:
    assert set(ROWS) == set(zoo)
    of_rows, shipped = ({name.split("/")[0] for name in names} for names in (ROWS.values(), NAMES))
    assert shipped == of_rows | OTHERS


@pytest.mark.parametrize("id", ROWS, ids=lambda id: re.split("[/#]", id)[-1])
def test_a_recipe_matches_its_zoo_entry(zoo: dict[str, Any], id: str) -> None:
    row, recipe = zoo[id], read_recipe(ROWS[id])
    assert re.split("[/#]", id)[-1] in " ".join(recipe.about.split())
    assert Path(recipe.model).name == Path(re.sub(r" \((.+)\)", r"-\1", row["trained_from"])).name
    assert recipe.vision_tower == row["vision_tower"]
    assert recipe.vision_tower.endswith("-336") == ("336" in str(row["resolution"]))
    assert recipe.template == template_of(row)
    assert recipe.aspect == ("square" if "absent" in row["image_aspect_ratio"] else row["image_aspect_ratio"])
    assert [list(size) for size in recipe.pinpoints] == (row.get("image_grid_pinpoints") or [])
    assert recipe.start_end == row["image_tokens"]["mm_use_im_start_end"]
    assert recipe.projector_type == row["projector"]["type"]
    stages = [recipe] if recipe.projector is None else [pretraining(recipe), recipe]
    assert stages[0].projector_type == recipe.projector_type
    assert Path(stages[0].data[0]).name == FILES[row["pretrain_data"]]
    assert f"{stages[0].epochs:g}e" == row["pretrain_schedule"]
    if row["format"] == "projector":
        return
    assert Path(recipe.data[0]).name == {**FILES, "ScienceQA": SCIENCE.get(row["family"])}[row["finetune_data"]]
    way = "lora" if recipe.lora_rank else "full_ft"
    assert row["finetune_schedule"].removeprefix("proj-1e, ") == f"{way}-{recipe.epochs:g}e"
    if "lora" in row:
        assert (recipe.lora_rank, recipe.lora_alpha) == (row["lora"]["r"], row["lora"]["alpha"])
        assert recipe.lora_dropout == row["lora"]["dropout"]


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[0] not in OTHERS])
def test_hyperparameters_are_those_of_the_training_scripts(name: str) -> None:
    """The values are those of checkpoints.md §13."""
    recipe, newer = read_recipe(name), "v1.5" in name or "v1.6" in name
    train = set(recipe.train)
    if name.endswith("/pretrain"):
        assert (recipe.lr, recipe.global_batch_size) == ((1e-3, 256) if newer else (2e-3, 128))
        assert train == {"projector", "rows"} if recipe.start_end else {"projector"}
    else:
        assert recipe.lr == (2e-4 if "v1.5" in name and recipe.lora_rank else 2e-5)
        assert recipe.projector_lr in (0, 2e-5)
        assert recipe.global_batch_size == (32 if re.match(r"llava-v(0|1\.1)-", name) else 128)
        assert train - {"vision"} == ({"decoder"} if "lightning-7b" in name else {"projector", "decoder"})
        assert recipe.vision_lr == (2e-6 if "v1.6" in name else 0)
        assert ("vision" in train) == ("v1.6" in name)
        assert recipe.order == ("by_modality_length" if newer else "shuffled")
    early = ("llava-v0", "llava-v1.1", "llava-lightning")
    assert recipe.image_place == ("as_written" if name.startswith(early) else "front")
    assert recipe.select_layer == -2
    assert recipe.max_length == (4096 if recipe.aspect == "anyres" else 2048)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_divides_evenly_among_one_two_four_or_eight_gpus(name: str) -> None:
    recipe = read_recipe(name)
    for_one_gpu = name.startswith("llava-tiny/")
    assert for_one_gpu or recipe.global_batch_size // recipe.micro_batch_size % 8 == 0
    assert name.startswith("custom/") or recipe.output_dir == f"runs/{name}"
    assert recipe.about


@pytest.mark.parametrize("folder", ["llava-v1.5", "llava-v1.5-13b"])
def test_qlora_is_lora_on_a_4_bit_base(folder: str) -> None:
    lora, qlora = (read_recipe(f"{folder}/finetune-{kind}") for kind in ("lora", "qlora"))
    assert qlora == replace(lora, quantize_base="nf4", about=qlora.about, output_dir=qlora.output_dir)


# ---------------------------------------------------------------------------------------------------- three steps


@dataclass(frozen=True)
class Trained:
    """A recipe after its run."""

    recipe: Recipe
    before: dict[str, Tensor]  # parameters and buffers at the start
    after: dict[str, Tensor]  # at the export
    folder: Path
    rows: tuple[int, ...]  # ids of <im_start> and <im_end>

    def changed(self) -> set[str]:
        return {name for name, value in self.before.items() if not torch.equal(value, self.after[name])}


SMALL = ("global_batch_size=4", "micro_batch_size=2", "max_steps=3", "save_every=0", "pad_to=32", "num_workers=0")
SMALL += ("compute_dtype=float32", "compile=false")


class Workspace:
    """The working folder: language models, a tower, data, and the runs so far."""

    def __init__(self, folder: Path, clip: Path, merged: Path):
        self.clip, self.merged = clip, merged
        self.llama = tiny.write_llama(folder / "llama")
        self.grouped = tiny.write_llama(folder / "grouped", num_key_value_heads=2)
        self.mpt = tiny.write_mpt(folder / "mpt")
        self.done: dict[str, Trained] = {}

    def changes(self, name: str) -> list[str]:
        """Changes that make a recipe fast to run."""
        recipe = read_recipe(name)
        if recipe.vision_tower is None:
            return [*SMALL, f"model={self.merged}"]
        grouped = "mistral" in recipe.model or "Yi" in recipe.model
        model = self.grouped if grouped else self.mpt if "mpt" in recipe.model else self.llama
        tiles = ["pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]"] if recipe.pinpoints else []
        return [*SMALL, *tiles, f"model={model}", f"vision_tower={self.clip}"]

    def trained(self, name: str) -> Trained:
        """Runs a recipe once, after the recipe that trains its projector."""
        if name not in self.done:
            recipe = read_recipe(name, self.changes(name))
            if recipe.projector:
                self.trained(recipe.projector.removeprefix("runs/").removesuffix("/model"))
            self.done[name] = self._train(recipe)
        return self.done[name]

    def _train(self, recipe: Recipe) -> Trained:
        for file in recipe.data:
            datasets.write(file, str(recipe.images))
        seen: dict[str, Any] = {}

        def fill(model: Llava, checkpoint: Checkpoint, *rest: Any) -> None:
            real_fill(model, checkpoint, *rest)
            ids = [checkpoint.tokenizer.id_of(text) for text in ("<im_start>", "<im_end>")]
            seen.update(before=state(model), rows=tuple(ids))

        def export(folder: Path, model: Llava, *rest: Any, **options: Any) -> None:
            seen.update(after=state(model))
            real_export(folder, model, *rest, **options)

        real_fill, real_export = run.fill, loop.export
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "fill", fill)
            patch.setattr(loop, "export", export)
            folder = loop.train(recipe, device="cpu")
        return Trained(recipe=recipe, folder=folder, **seen)


def state(model: Llava) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def workspace(clip: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Workspace(folder, clip, checkpoint)


def stated_parameters(run: Trained) -> set[str]:
    """The names of all parameters that the recipe trains, except the two rows of the embedding table."""
    parts = set(run.recipe.train) - {"rows"}
    found = {name for name in run.before if name.split(".")[0] in parts}
    if run.recipe.lora_rank:
        found = {name for name in found if not name.startswith("decoder.") or ".adapters." in name}
    return found | ({"newline"} & set(run.before) if "projector" in parts else set())


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_change_exactly_the_stated_parts(workspace: Workspace, name: str) -> None:
    run = workspace.trained(name)
    changed, rows = run.changed(), "rows" in run.recipe.train
    embeddings = {"decoder.embed.weight", "decoder.head.weight"} & changed if rows else set()
    assert changed - embeddings == stated_parameters(run)
    if rows:
        before, after = (tensors["decoder.embed.weight"] for tensors in (run.before, run.after))
        assert tuple((before != after).any(1).nonzero()[:, 0].tolist()) == run.rows
        assert "decoder.head.weight" not in changed or torch.equal(run.after["decoder.head.weight"], after)  # tied
    if run.recipe.quantize_base == "nf4":
        assert any(name.endswith("codes") for name in run.before)
    assert all(torch.isfinite(value).all() for value in run.after.values() if value.is_floating_point())
    logged = [json.loads(line) for line in Path(run.recipe.output_dir, "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert not any(row["skipped"] for row in logged)


@pytest.mark.parametrize("name", NAMES)
def test_the_export_opens_in_the_format_of_the_zoo(workspace: Workspace, name: str) -> None:
    run = workspace.trained(name)
    recipe = run.recipe
    kind = "projector" if name.endswith("pretrain") else "lora" if "lora" in name else "llava"
    base = None if kind == "llava" else recipe.model
    assert open_checkpoint(run.folder, LoadOptions(base=base)).format == (
        "mpt" if kind == "llava" and "mpt" in name else kind
    )
    assistant = llava.load(run.folder, base=base, dtype="float32", device="cpu")
    config = assistant.config
    assert config.image is not None
    assert config.start_end == recipe.start_end
    assert config.image.aspect == recipe.aspect
    assert config.template == recipe.template
    loaded, expected = assistant.model.state_dict(), merged(run)
    assert set(expected) == {name for name in loaded if recipe.quantize_base == "none" or not is_4_bit(run, name)}
    rounded = kind == "llava" or "rows" in recipe.train  # exported in 16 bits; MPT in bfloat16
    close = {"rtol": 4e-3, "atol": 1e-5} if rounded else {"rtol": 0.0, "atol": 2e-6}
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name].float(), tensor, **close, msg=lambda m, n=name: f"{n}: {m}")


def merged(run: Trained) -> dict[str, Tensor]:
    """The trained weights with the adapters merged, without 4-bit matrices."""
    found = {name.replace(".base.weight", ".weight"): value for name, value in run.after.items()}
    found = {name: value for name, value in found.items() if ".adapters." not in name and ".base." not in name}
    scale = run.recipe.lora_alpha / max(run.recipe.lora_rank, 1)
    for name in found:
        if parts := [run.after[key] for key in adapters_of(run, name)]:
            found[name] = found[name] + scale * torch.cat([b @ a for a, b in zip(parts[::2], parts[1::2], strict=True)])
    return found


def adapters_of(run: Trained, weight: str) -> list[str]:
    """The names of the tensors A, B, A, B, … of a weight, in the order of its stacked parts."""
    return [name for name in run.after if name.startswith(weight.removesuffix("weight") + "adapters.")]


def is_4_bit(run: Trained, weight: str) -> bool:
    return weight.removesuffix("weight") + "base.codes" in run.after


def test_the_matrices_under_adapters_equal_the_base_bit_for_bit(workspace: Workspace) -> None:
    run = workspace.trained("llava-v1.5/finetune-lora")
    frozen = {name for name in run.before if name.startswith("decoder.") and ".adapters." not in name}
    base = dict(open_checkpoint(workspace.llama).read_tensors())
    assert len(frozen) == len(base)
    for name in frozen:
        assert torch.equal(run.after[name], base[name.replace(".base.", ".")].float()), name


def test_the_command_gives_the_same_result(workspace: Workspace) -> None:
    run = workspace.trained("llava-v1.5/finetune-lora")
    changes = [word for change in workspace.changes("llava-v1.5/finetune-lora") for word in ("--set", change)]
    done = run_well(
        "train", "llava-v1.5/finetune-lora", *changes, "--set", "output_dir=runs/command", "--device", "cpu"
    )
    assert "runs/command/model" in done.stdout
    both = [
        dict(open_checkpoint(folder, LoadOptions(base=workspace.llama)).read_tensors())
        for folder in (run.folder, "runs/command/model")
    ]
    assert both[0].keys() == both[1].keys()
    for name, tensor in both[0].items():
        torch.testing.assert_close(both[1][name], tensor)


# ----------------------------------------------------------------------------------------------------- the plan

DIM, MLP = 64, 172  # of tiny.llama_config
LLAMA = 2 * tiny.PIECES * DIM + DIM + 2 * (4 * DIM**2 + 3 * DIM * MLP + 2 * DIM)
PROJECTOR = 2 * (DIM**2 + DIM)
CLIP_BLOCK = 4 * (DIM**2 + DIM) + 2 * DIM * tiny.CLIP_MLP + tiny.CLIP_MLP + DIM + 4 * DIM
CLIP = DIM + DIM * 3 * tiny.PATCH**2 + (tiny.N_PATCHES + 1) * DIM + 2 * DIM + 2 * CLIP_BLOCK  # without the last block


def planned(workspace: Workspace, name: str, *more: str) -> Any:
    recipe = read_recipe(name, [*workspace.changes(name), *more])
    for file in recipe.data:
        datasets.write(file, str(recipe.images))
    return make_plan(recipe)


def test_a_plan_counts_trained_and_frozen_parameters(workspace: Workspace) -> None:
    workspace.trained("llava-v1.5/pretrain")
    plan = planned(workspace, "llava-v1.5/pretrain")
    assert (plan.format, plan.trained) == ("projector", {"projector": PROJECTOR})
    assert plan.frozen == {"vision": CLIP, "decoder": LLAMA}
    plan = planned(workspace, "llava-v1.5/finetune")
    assert (plan.format, plan.trained) == ("llava", {"projector": PROJECTOR, "decoder": LLAMA})
    plan = planned(workspace, "llava-v1.5/finetune-lora", "lora_rank=8")
    adapters = 2 * 8 * (4 * 2 * DIM + 3 * (DIM + MLP))
    assert (plan.format, plan.trained) == ("lora", {"projector": PROJECTOR, "adapters": adapters})
    assert plan.frozen == {"vision": CLIP, "decoder": LLAMA}


def test_a_plan_counts_samples_steps_and_bytes(workspace: Workspace) -> None:
    plan = planned(workspace, "llava-v1.5/pretrain", "max_steps=0", "epochs=3", "global_batch_size=6")
    assert (plan.samples, plan.broken, plan.global_batch_size) == (datasets.N, 0, 6)
    assert (plan.steps_per_epoch, plan.steps) == (math.ceil(datasets.N / 6), 3 * math.ceil(datasets.N / 6))
    assert plan.memory_bytes["weights"] == 4 * (PROJECTOR + LLAMA + CLIP)
    assert plan.memory_bytes["gradients"] == 4 * PROJECTOR
    assert plan.memory_bytes["optimizer"] == 8 * PROJECTOR
    assert (
        tiny.N_PATCHES < plan.target_tokens_per_sample + tiny.N_PATCHES < plan.tokens_per_sample < tiny.N_PATCHES + 60
    )
    assert plan.tokens == round(plan.tokens_per_sample * 6 * plan.steps)


def command(*words: str) -> int:
    """Runs `llava train WORDS` in this process and returns its exit code."""
    with pytest.raises(SystemExit) as done:
        main(["train", *words])
    return int(done.value.code or 0)


def test_the_command_prints_the_plan_and_starts_nothing(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "llava-v1.5/pretrain"
    planned(workspace, name)
    changes = [word for change in workspace.changes(name) for word in ("--set", change)]
    assert command(name, *changes, "--set", "output_dir=runs/nothing", "--plan") == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^trained +{PROJECTOR:,} parameters: projector {PROJECTOR:,}$", shown, re.MULTILINE)
    assert not Path("runs/nothing").exists()


# -------------------------------------------------------------------------------------------- names and values


def test_the_shipped_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--list") == 0
    listed = capsys.readouterr().out.split()
    assert listed == NAMES
    assert len(listed) == len(list(RECIPES.rglob("*.toml")))
    assert {"llava-v1.5/finetune-lora", "custom/finetune-lora", "llava-tiny/pretrain"} <= set(listed)


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (["llava-v1.5/finetune_lora"], ["llava-v1.5/finetune-lora", "finetune_lora"]),
        (["mine.toml"], ["mine.toml"]),
        (["llava-v1.5/finetune", "--set", "learning_rate=1"], ["'learning_rate'", "expected one of", " lr,"]),
        (["llava-v1.5/finetune", "--set", "epoch=3"], ["'epoch'", "'epochs'"]),
        (["llava-v1.5/finetune", "--set", "epochs"], ["epochs", "key=value"]),
    ],
)
def test_the_command_refuses_in_one_line(
    words: list[str], mentions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for mention in mentions:
        assert mention in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("global_batch_siz=3", "closest key is 'global_batch_size'"),
        ("vision_tour=x", "closest key is 'vision_tower'"),
        ("global_batch_size=many", "global_batch_size is 'many'; expected int"),
        ("global_batch_size=1.5", "global_batch_size is 1.5; expected int"),
        ("global_batch_size=true", "global_batch_size is True; expected int"),
        ("global_batch_size=100", "global_batch_size is 100; expected a multiple of micro_batch_size"),
        ("lr=high", "lr is 'high'; expected float"),
        ("start_end=1", "start_end is 1; expected bool"),
        ("train=projectors", "expected one of 'projector'"),
        ("betas=[0.9]", "expected 2 values"),
        ("data=[]", "data is (); expected at least one file"),
        ("template=vicuna", "vicuna_v1"),
        ("aspect=anyres", "pinpoints"),
        ("model=3", "model is 3; expected str"),
    ],
)
def test_a_wrong_value_is_refused_with_the_expected_one(change: str, says: str) -> None:
    with pytest.raises(LlavaError, match=re.escape(says)) as raised:
        read_recipe("llava-v1.5/finetune", [change])
    assert "\n" not in str(raised.value)


def test_values_are_parsed_as_toml_and_bare_words_as_strings() -> None:
    recipe = read_recipe(
        "llava-v1.5/finetune",
        ["lr=3e-5", "epochs=2", "data=my.json", "model=a/b=c", "start_end=true", " global_batch_size =64"],
    )
    assert (recipe.lr, recipe.epochs, recipe.data) == (3e-5, 2.0, ("my.json",))
    assert (recipe.model, recipe.start_end, recipe.global_batch_size) == ("a/b=c", True, 64)
    assert read_recipe("llava-v1.5/finetune", ["data=['a.json', 'b.json']"]).data == ("a.json", "b.json")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    """In a file, with --set, and in the folder of an old run."""
    message = f"`{old}` is now called `{new}`"
    text = (RECIPES / "custom" / "finetune-lora.toml").read_text()
    file, saved = tmp_path / "mine.toml", tmp_path / "recipe.json"
    file.write_text(f"{old} = 1\n{text}")
    saved.write_text(json.dumps({old: 1}))
    recipe = read_recipe("custom/finetune-lora", [f"output_dir={tmp_path}"])
    for call in (
        lambda: read_recipe(str(file)),
        lambda: read_recipe("custom/finetune-lora", [f"{old}=1"]),
        lambda: check_folder(tmp_path, recipe),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert new in to_dict(recipe)
    assert old not in to_dict(recipe)


def test_a_run_from_before_a_key_existed_has_its_default(tmp_path: Path) -> None:
    recipe = read_recipe("custom/finetune-lora")
    older = {key: value for key, value in to_dict(recipe).items() if key != "transparency"}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    assert changed_keys(tmp_path / "recipe.json", recipe) == set()
    white = replace(recipe, transparency="white")
    assert changed_keys(tmp_path / "recipe.json", white) == {"transparency"}


def test_a_toml_file_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((RECIPES / "custom" / "finetune-lora.toml").read_text())
    assert read_recipe(str(file)) == read_recipe("custom/finetune-lora")
    file.write_text('model = "a"')
    with pytest.raises(ConfigError, match="data is missing"):
        read_recipe(str(file))
    file.write_text("model = a")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(str(file))
    with pytest.raises(ConfigError, match="closest key is 'projector_lr'"):
        recipe_from({"model": "a", "data": "b", "projector_lrr": 1}, "here")


def test_the_list_of_recipes_is_also_available_as_json() -> None:
    names = json.loads(run_well("train", "--list", "--json").stdout)
    assert names == run_well("train", "--list").stdout.split()
    assert "llava-v1.5/finetune" in names
