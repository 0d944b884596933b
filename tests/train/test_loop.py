"""The training loop: against transformers and the original, over ranks, after kill -9, and what it refuses."""

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import llava.train.loss
import llava.train.start
from llava.checkpoint.open import open_checkpoint
from llava.convert.original import named
from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.model.decoder import Decoder
from llava.preprocess.inputs import ModelInput
from llava.train.batch import collate
from llava.train.loop import train
from llava.train.loss import cross_entropy
from llava.train.optim import optimizer
from llava.train.ranks import ranks
from llava.train.recipe import Recipe
from llava.train.resume import Saver
from llava.train.start import start
from tests import command, tiny, training
from tests.golden.test_answers import FOLDERS, TOWERS
from tests.training import LORA, School, begin, from_parts, gradients, losses, recipe, rows, run_apart, trainee_of


@pytest.fixture(scope="module")
def school(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> School:
    folder = tmp_path_factory.mktemp("school")
    llava = tiny.write_llava(folder / "llava", clip=clip, torch_dtype="float32", layout="safetensors")
    return training.build_school(folder, clip, llava)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As runs apart have it: sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(recipe: Recipe) -> list[float]:
    """Trains here; the losses."""
    train(recipe, device="cpu")
    return losses(Path(recipe.out))


def raw(model: Path) -> dict[str, Tensor]:
    """A folder's tensors by their names on disk."""
    if (model / "mm_projector.bin").is_file():
        return torch.load(model / "mm_projector.bin", weights_only=True)
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# ---------------------------------------------------------------------------------------- against transformers


class Plain(nn.Module):
    """LLaVA-1.5 put together of transformers' parts."""

    def __init__(self, school: School) -> None:
        transformers = pytest.importorskip("transformers")
        super().__init__()
        tensors = raw(school.llava)
        config = transformers.LlamaConfig.from_pretrained(school.llama)
        self.llama = transformers.LlamaForCausalLM(config)
        own = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
        self.llama.load_state_dict(own)
        self.tower = transformers.CLIPVisionModel.from_pretrained(school.clip, dtype=torch.float32).requires_grad_(
            False
        )
        self.mm_projector = nn.Sequential(nn.Linear(tiny.CLIP_DIM, 64), nn.GELU(), nn.Linear(64, 64))
        prefix = "model.mm_projector."
        self.mm_projector.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )

    def forward(self, inputs: list[ModelInput]) -> Tensor:
        """Right-padded rows -> transformers' own loss."""
        pad = nn.utils.rnn.pad_sequence
        ids = pad([one.ids for one in inputs], batch_first=True)
        labels = pad([one.labels for one in inputs], batch_first=True, padding_value=-100)
        mask = pad([torch.ones(len(one.ids)) for one in inputs], batch_first=True)
        x = self.llama.get_input_embeddings()(ids.clamp(min=0))
        if pixels := [one.pixels for one in inputs if one.pixels is not None]:
            states = self.tower(torch.cat(pixels), output_hidden_states=True).hidden_states
            x = x.masked_scatter((ids < 0)[..., None], self.mm_projector(states[-2][:, 1:]))
        loss: Tensor = self.llama(inputs_embeds=x, attention_mask=mask, labels=labels).loss
        return loss

    def named(self) -> dict[str, Tensor]:
        """Under the names of a LLaVA's files."""
        projector = {f"model.{name}": p for name, p in self.named_parameters() if name.startswith("mm_projector")}
        return {**dict(self.llama.named_parameters()), **projector}


def plain_loop(model: nn.Module, recipe: Recipe, parameters: list[dict[str, Any]]) -> list[float]:
    """What anybody writes with transformers: the losses."""
    transformers = pytest.importorskip("transformers")
    _, batches = trainee_of(recipe)
    n = recipe.max_steps
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=recipe.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(recipe.warmup * n), n)
    found = []
    for step in range(n):
        loss = model(training.inputs_of(batches, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


ORACLE = {"max_steps": 20, "batch": 6, "micro_batch": 6, "save_every": 0, "warmup": 0.15, "rate": 5e-4}


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "weight_decay": 0.1},
        {"packing": False, "projector_rate": 1e-3},
        {"packing": True, "train": ["projector"]},
    ],
    ids=["full, packed", "full, padded", "projector"],
)
def test_twenty_steps_equal_a_plain_transformers_loop(school: School, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = recipe(school, tmp_path / "run", **{**ORACLE, **changes})
    plain = Plain(school)
    names = {name: p for name, p in plain.named().items() if asked.train != ("projector",) or "projector" in name}
    rate = {True: asked.projector_rate or asked.rate, False: asked.rate}
    groups = [
        {
            "params": [p],
            "lr": rate["mm_projector" in name],
            "weight_decay": asked.weight_decay * (not name.endswith(("norm.weight", "bias"))),
        }
        for name, p in names.items()
    ]
    wanted = plain_loop(plain, asked, groups)
    assert run(asked) == pytest.approx(wanted, abs=1e-4)
    assert wanted[-1] < wanted[0] - 0.3  # something was learnt
    trained, start = raw(tmp_path / "run" / "model"), raw(school.llava)
    assert set(names) <= set(trained)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, names.get(name, start[name]).detach(), rtol=0, atol=1e-4, msg=name)
    assert all((trained[name] - start[name]).abs().max() > 1e-3 for name in names)


# ------------------------------------------------------------------------------------------ against the original

FAMILIES = {"a": "a_v1.5", "b": "b_llama2", "c merged": "c_delta_v0", "d merged": "d_delta_v1.1", "mpt": "f_mpt"}
RUNS = [*range(11), "mpt"]  # of training.json; its twelfth masks everything, f_mpt has the right one


def golden_run(golden: Path, number: int | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was recorded, and the projector's gradients by their names on disk."""
    if number == "mpt":
        folder = golden / "f_mpt" / "golden"
        record = json.loads((folder / "training.json").read_text())
        record |= {"checkpoint": "mpt", "image_aspect_ratio": "square", "model_max_length": 2048}
        tensors = load_file(folder / "training.safetensors")
        return record, {name.removeprefix("grad."): tensor for name, tensor in tensors.items()}
    record = json.loads((golden / "training" / "training.json").read_text())["runs"][number]
    prefix = record["gradients"].replace("*", "grad.")
    tensors = load_file(golden / "training" / "gradients.safetensors")
    return record, {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def golden_recipe(golden: Path, checkpoints: Path, record: dict[str, Any], folder: Path) -> Recipe:
    family = FAMILIES[record["checkpoint"]]
    values = {
        "model": str(checkpoints / FOLDERS[family]),
        "vision_tower": str(checkpoints / "vision" / TOWERS[family]),
        "template": {"v1": "vicuna_v1"}.get(record["template"], record["template"]),
        "start_end": record["mm_use_im_start_end"],
        "aspect": record["image_aspect_ratio"],
        "max_length": record["model_max_length"],
    }
    if family in ("c_delta_v0", "d_delta_v1.1"):
        values["base"] = str(checkpoints / "base" / "llama-7b")
    data = training.write_data(folder / "data.json", [sample["data"] for sample in record["samples"]])
    here = School(folder, folder, folder, data, golden / "images")
    return recipe(here, folder / "run", **values)


@pytest.mark.parametrize("number", RUNS)
def test_losses_and_gradients_are_the_originals(
    golden: Path, golden_checkpoints: Path, tmp_path: Path, number: int | str
) -> None:
    record, projector = golden_run(golden, number)
    asked = golden_recipe(golden, golden_checkpoints, record, tmp_path)
    trainee, batches = trainee_of(asked)
    wanted = record["sample_losses"]
    for i, loss in enumerate(wanted):
        alone = batches.make([i])
        assert bool(alone.skipped) == (loss is None)
        if loss is not None:
            assert trainee(alone).item() / len(alone.at) == pytest.approx(loss, abs=2e-5)
    batch = batches.make(range(len(wanted)))
    total, grads = gradients(trainee, batch)
    assert total.item() / len(batch.at) == pytest.approx(record["batch_loss"], abs=2e-5)
    means = {name.removeprefix("model."): grad / len(batch.at) for name, grad in grads.items()}
    ours = {item.name: torch.cat(list(item.parts())) for item in named(means, trainee.model.config)}
    norms = {name: grad.double().norm().item() for name, grad in ours.items()}
    assert norms == pytest.approx(record["grad_norms"], rel=1e-5, abs=1e-9)
    for name, grad in projector.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def decoder() -> Decoder:
    from llava.config import DecoderConfig

    sizes = {"n_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "mlp_dim": 8, "vocab_size": 97}
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(kind="llama", max_seq=64, eps=1e-5, tied=False, rope_theta=1e4, **sizes))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_chunked_cross_entropy_is_that_of_whole_logits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava.train.loss, "_CHUNK_VALUES", 97 * 7)
    x, to = torch.randn(50, 16, requires_grad=True), torch.randint(0, 97, (50,))
    inputs = (x, decoder.head.weight)
    whole = F.cross_entropy(decoder.logits(x), to, reduction="sum")
    wanted = torch.autograd.grad(whole, inputs)
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    made: list[int] = []
    monkeypatch.setattr(decoder, "logits", lambda x, own=decoder.logits: made.append(len(x)) or own(x))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = cross_entropy(decoder, x, to)
        found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, wanted)
    assert max(made) == 7  # rows of logits at once
    assert len(made) == 2 * 8  # of each chunk once to go forward and once to go back
    assert max(held) <= decoder.head.weight.numel()
    assert cross_entropy(decoder, x[:0], to[:0]) == 0


def test_the_loss_is_the_mean_over_all_tokens_of_the_step(school: School, tmp_path: Path) -> None:
    asked = recipe(school, tmp_path / "run", max_steps=1, warmup=0, batch=6, micro_batch=2)
    trainee, batches = trainee_of(asked)
    inputs = training.inputs_of(batches, 0)
    alone = [collate([one], packing=False, pad_to=1, slots=1, limit=256) for one in inputs]
    counts = [len(batch.at) for batch in alone]
    assert len(set(counts)) > 3  # else the mean of means would be the same
    trainee.eval()
    assert run(asked) == pytest.approx([sum(trainee(b).item() for b in alone) / sum(counts)], abs=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_do_not_change_the_result(school: School, tmp_path: Path, packing: bool) -> None:
    runs = [recipe(school, tmp_path / str(n), micro_batch=n, packing=packing) for n in (1, 2, 6)]
    one, two, six = map(run, runs)
    assert one == pytest.approx(six, abs=1e-5)
    assert two == pytest.approx(six, abs=1e-5)


# ------------------------------------------------------------------------------------------------- how it runs


@pytest.fixture(scope="module")
def usual(school: School, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[float]]:
    """A run that others are compared with."""
    torch.set_num_threads(1)
    asked = recipe(school, tmp_path_factory.mktemp("usual") / "run", max_steps=8)
    return asked, run(asked)


def again(usual: tuple[Recipe, list[float]], out: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """Losses with some changes, and the usual ones."""
    return run(replace(usual[0], out=str(out), **changes)), usual[1]


def test_checkpointing_changes_nothing(usual: tuple[Recipe, list[float]], tmp_path: Path) -> None:
    ours, wanted = again(usual, tmp_path / "run", checkpointing=True)
    assert ours == wanted


def test_worker_processes_change_nothing(usual: tuple[Recipe, list[float]], tmp_path: Path) -> None:
    ours, wanted = again(usual, tmp_path / "run", workers=2)
    assert ours == wanted


@pytest.mark.parametrize(("master", "most"), [("float32", 0.05), ("bfloat16", 0.25)])
def test_bfloat16_stays_near_float32(
    usual: tuple[Recipe, list[float]], tmp_path: Path, master: str, most: float
) -> None:
    ours, wanted = again(usual, tmp_path / "run", compute="bfloat16", master=master)
    assert ours == pytest.approx(wanted, abs=most)
    assert ours != wanted


def test_weights_that_learn_are_float32_under_bfloat16_compute(school: School, tmp_path: Path) -> None:
    """A step of 1e-6 is lost in bfloat16 and kept in float32."""
    changed = {}
    for master in ("float32", "bfloat16"):
        asked = recipe(school, tmp_path / master, compute="bfloat16", master=master, rate=1e-6, max_steps=2, warmup=0)
        before, _ = trainee_of(asked)
        train(asked, device="cpu")
        after, _ = trainee_of(asked)
        restore(asked, after)
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        changed[master] = sum(int((a != b).sum()) for a, b in pairs if a.requires_grad)
        assert {p.dtype for p in after.parameters() if p.requires_grad} == {getattr(torch, master)}
    assert changed["float32"] > 100 * max(changed["bfloat16"], 1)


@pytest.mark.parametrize("packing", [True, False])
def test_compiled_equals_eager(school: School, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, cut into forward and backward as for the compiler, and run without its minutes of C++."""
    compiled = []
    traced = partial(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or traced(self))
    values = {"max_steps": 3, "packing": packing, "checkpointing": True}
    eager = run(recipe(school, tmp_path / "eager", **values))
    assert run(recipe(school, tmp_path / "compiled", compile=True, **values)) == pytest.approx(eager, abs=1e-4)
    assert len(compiled) == 2 + 2  # blocks of decoder and tower


def restore(recipe: Recipe, trainee: llava.train.loss.Trainee) -> None:
    """Puts the run's last state into it."""
    with ranks("cpu") as here:
        saver = Saver(Path(recipe.out) / "checkpoints", recipe.keep, here)
        newest = saver.newest()
        assert newest is not None
        saver.load(newest, trainee, optimizer(trainee, recipe))


def test_a_tower_that_learns_has_its_own_rate_and_comes_with_the_export(school: School, tmp_path: Path) -> None:
    parts = ["projector", "decoder", "vision"]
    asked = recipe(school, tmp_path / "run", train=parts, vision_rate=1e-5, projector_rate=1e-2, rate=1e-3)
    trainee, _ = trainee_of(asked)
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    model = train(asked, device="cpu")
    restore(asked, trainee)
    after = dict(trainee.model.named_parameters())
    moved = {name: (after[name] - p).abs().max().item() for name, p in before.items()}
    total = sum(row["rate"] for row in rows(tmp_path / "run"))
    for name, most in moved.items():
        share = {"vision": 1e-2, "projector": 10, "decoder": 1}[name.partition(".")[0]]
        assert 0 < most < 2 * share * total, name  # Adam's steps are about a rate long
    written = training.weights(model)
    assert set(written) == set(after)
    for name, tensor in written.items():
        assert torch.equal(tensor, after[name]), name


def test_an_export_has_the_trained_weights_in_the_type_of_its_model(school: School, tmp_path: Path) -> None:
    half = tiny.write_llava(tmp_path / "half", clip=school.clip)  # float16
    for model, dtype in ((school.llava, torch.float32), (half, torch.float16)):
        asked = recipe(school, tmp_path / str(dtype), model=str(model), compute="bfloat16", max_steps=3)
        written = open_checkpoint(train(asked, device="cpu")).sources
        trainee, _ = trainee_of(asked)
        restore(asked, trainee)
        for name, p in trainee.model.named_parameters():
            if p.requires_grad:
                assert torch.equal(written[name].read(), p.detach().to(dtype)), name


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_of_a_frozen_language_model_the_start_and_end_rows_alone_learn(
    school: School, tmp_path: Path, kind: str
) -> None:
    values = from_parts(school) | {"train": ["projector", "rows"], "start_end": True, "save_every": 0}
    if kind == "mpt":  # its head is the embedding table: nor does that learn
        values |= {"model": str(tiny.write_mpt(tmp_path / "mpt", torch_dtype="float32")), "template": "mpt"}
    asked = recipe(school, tmp_path / "run", **values)
    train(asked, device="cpu")
    trainee, _ = trainee_of(asked)
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    restore(asked, trainee)
    changed = {name for name, p in trainee.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder.embed.weight"} | {name for name in before if name.startswith("projector")}
    table = trainee.model.decoder.embed.weight
    different = (table != before["decoder.embed.weight"]).any(1).nonzero()[:, 0].tolist()
    assert different == trainee.rows.tolist()


# ------------------------------------------------------------------------------------------------------- ranks

SPREAD = {
    "full, tower too, text-only ranks": {"train": ["projector", "decoder", "vision"], "batch": 3, "micro_batch": 1},
    "QLoRA": {**LORA, "quantize_base": "nf4", "lora_dropout": 0.3, "micro_batch": 2, "order": "by_modality_length"},
    "projector and rows": {"train": ["projector", "rows"], "start_end": True, "checkpointing": True},
}


@pytest.mark.parametrize("case", SPREAD)
def test_the_number_of_ranks_changes_nothing(school: School, tmp_path: Path, case: str) -> None:
    """Two or three ranks share two or three micro-batches: some hold no picture, some nothing."""
    values = SPREAD[case]
    one = recipe(school, tmp_path / "one", **values)
    wanted = run(one)
    for n in (2,) if case == "QLoRA" else (3,):
        some = recipe(school, tmp_path / f"on{n}", **values)
        run_apart(some, ranks=n)
        assert losses(tmp_path / f"on{n}") == pytest.approx(wanted, abs=1e-5)
        for row, other in zip(rows(tmp_path / f"on{n}"), rows(tmp_path / "one"), strict=True):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert [row[k] for k in ("tokens", "learnt", "samples")] == [
                other[k] for k in ("tokens", "learnt", "samples")
            ]
        found, expected = (stored(tmp_path / name / "model") for name in (f"on{n}", "one"))
        assert set(found) == set(expected)
        for name, tensor in found.items():
            if not name.endswith("k_proj.bias"):  # no loss depends on it: Adam makes steps of rounding errors
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    if case.startswith("full"):
        _, batches = trainee_of(one)
        kinds = [{batches.samples.lengths[i] > 0 for p in batches.order.step(s) for i in p.samples} for s in range(6)]
        assert {True, False} in kinds


def test_ranks_may_write_the_tokenizer_at_once(school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = llava.train.start._write_tokenizer

    def after_another(*args: Any) -> None:
        write(*args)  # the other rank's
        write(*args)

    monkeypatch.setattr(llava.train.start, "_write_tokenizer", after_another)
    values = from_parts(school) | {"train": ["projector", "rows"], "start_end": True}
    found = start(recipe(school, tmp_path / "run", **values), tmp_path / "tokenizer")
    assert found.tokenizer.id_of("<im_end>") == tiny.PIECES + 2


def stored(model: Path) -> dict[str, Tensor]:
    """All tensors of all files."""
    found = {}
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        found |= {f"{file.name}: {name}": tensor for name, tensor in tensors.items()}
    return found


def test_tied_tables_are_trained_as_one_on_two_ranks(school: School, tmp_path: Path) -> None:
    llama = tiny.write_llama(tmp_path / "tied", tie_word_embeddings=True, torch_dtype="float32")
    values = {"model": str(llama), "vision_tower": str(school.clip), "max_steps": 4}
    wanted = run(recipe(school, tmp_path / "one", **values))
    run_apart(recipe(school, tmp_path / "two", **values), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(wanted, abs=1e-5)
    written = training.weights(tmp_path / "two" / "model")
    before = training.weights(llama)
    for name, tensor in training.weights(tmp_path / "one" / "model").items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert (written["decoder.embed.weight"] - before["decoder.embed.weight"]).abs().max() > 1e-4


def test_two_ranks_in_bfloat16_stay_near_one(school: School, tmp_path: Path) -> None:
    """Sharded, all is computed in bfloat16; alone, the residual stream is float32."""
    values = {"compute": "bfloat16", "train": ["projector", "decoder", "vision"], "max_steps": 4}
    wanted = run(recipe(school, tmp_path / "one", **values))
    run_apart(recipe(school, tmp_path / "two", **values), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(wanted, abs=0.05)


@pytest.mark.slow
def test_the_command_runs_under_torchrun(school: School, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(school, tmp_path / "two", max_steps=3, workers=1))
    torchrun = [command.sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = command.run("train", file, "--device", "cpu", command=[*torchrun, "-m", "llava.cli"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the trained model") == 1
    assert losses(tmp_path / "two") == pytest.approx(run(recipe(school, tmp_path / "one", max_steps=3)), abs=1e-5)


def toml(file: Path, recipe: Recipe) -> Path:
    """The recipe as its file."""
    values = {key: value for key, value in training.to_dict(recipe).items() if value not in (None, ())}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


# -------------------------------------------------------------------------------------------------- after kill -9

STAGES = {
    "stage 1": {"train": ["projector"], "rate": 1e-2},
    "stage 2": {"packing": False},
    "LoRA with dropout": {**LORA, "lora_dropout": 0.5},
}
LONG = {"max_steps": 12, "save_every": 1, "batch": 3, "micro_batch": 1, "order": "by_modality_length"}


def until(moment: Any, run: training.Apart) -> None:
    """Waits for it and kills the run, which must not be over."""
    end = time.monotonic() + training.TIMEOUT_S
    while not moment() and all(process.is_alive() for process in run.processes) and time.monotonic() < end:
        time.sleep(0.001)
    assert moment(), run.told.read_text()
    run.kill()
    assert [process.exitcode for process in run.processes] == [-9] * len(run.processes)


def at_step(out: Path, step: int) -> Any:
    return lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") >= step


def while_saving(out: Path, step: int) -> Any:
    return lambda: any(path.name >= f".step-{step:08}" for path in (out / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(school: School, tmp_path: Path, stage: str) -> None:
    values = LONG | STAGES[stage]
    wanted = run(recipe(school, tmp_path / "whole", **values))
    out = tmp_path / "torn"
    asked = recipe(school, out, **values)
    until(at_step(out, random.Random(stage).randint(1, 4)), begin(asked))
    until(while_saving(out, random.Random(stage).randint(7, 10)), begin(asked))
    left = len(list((out / "checkpoints").glob("step-*")))
    assert 1 <= left <= 3
    run_apart(asked)
    assert losses(out) == wanted
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-00000011", "step-00000012"]
    for key in ("samples", "tokens", "rate", "epoch"):
        assert [row[key] for row in rows(out)] == [row[key] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize(("stage", "before", "after"), [("stage 2", 2, 1), ("LoRA with dropout", 1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    school: School, tmp_path: Path, stage: str, before: int, after: int
) -> None:
    values = LONG | STAGES[stage] | {"max_steps": 10, "micro_batch": 1, "batch": 2}
    wanted = run(recipe(school, tmp_path / "whole", **values))
    out = tmp_path / "torn"
    asked = recipe(school, out, **values)
    until(at_step(out, 5), begin(asked, ranks=before))
    assert list((out / "checkpoints").glob("step-*"))
    run_apart(asked, ranks=after)
    assert losses(out) == pytest.approx(wanted, abs=1e-5)
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.fixture
def finished(usual: tuple[Recipe, list[float]], tmp_path: Path) -> Recipe:
    """The usual run, in a place where it may be changed."""
    shutil.copytree(usual[0].out, tmp_path / "run")
    asked = replace(usual[0], out=str(tmp_path / "run"))
    file = tmp_path / "run" / "recipe.json"
    file.write_text(file.read_text().replace(usual[0].out, asked.out))
    return asked


def test_a_finished_run_says_so_and_stays(finished: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = command.files(Path(finished.out))
    assert train(finished, device="cpu") == Path(finished.out) / "model"
    assert "finished already" in caplog.text
    assert command.files(Path(finished.out)) == before


def test_a_run_killed_while_it_exports_only_exports(finished: Recipe) -> None:
    out = Path(finished.out)
    before, log = stored(out / "model"), (out / "log.jsonl").read_bytes()
    shutil.rmtree(out / "model")
    train(finished, device="cpu")
    after = stored(out / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [json.loads(a)["loss"] for a in log.splitlines()] == losses(out)


def test_what_a_killed_writer_left_is_not_taken_for_a_checkpoint(
    usual: tuple[Recipe, list[float]], finished: Recipe
) -> None:
    out = Path(finished.out)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    last.rename(last.with_name(f".{last.name}.partial"))
    for whole in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(whole)
    next((out / "checkpoints").glob(".step-*/*.distcp")).write_bytes(b"torn")
    train(finished, device="cpu")
    assert losses(out) == usual[1]


def test_a_checkpoint_that_is_damaged_is_named(finished: Recipe) -> None:
    out = Path(finished.out)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    file = next(last.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{last.name}.*remove it") as raised:
        train(finished, device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"rate": 2e-3}, "rate"), ({"seed": 1}, "seed"), ({"batch": 3}, "batch"), ({"packing": False}, "packing")],
)
def test_another_recipe_in_the_same_folder_is_refused(finished: Recipe, changes: dict[str, Any], key: str) -> None:
    shutil.rmtree(Path(finished.out) / "model")
    with pytest.raises(ConfigError, match=f"another {key}; set out"):
        train(replace(finished, **changes), device="cpu")


def test_other_data_behind_the_same_path_are_refused(school: School, tmp_path: Path) -> None:
    samples = json.loads(school.data.read_text())
    (tmp_path / "data.json").write_text(json.dumps(samples))
    asked = recipe(school, tmp_path / "run", data=str(tmp_path / "data.json"))
    train(asked, device="cpu")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "data.json").write_text(json.dumps(samples[:-1]))
    with pytest.raises(ConfigError, match=f"began on {len(samples)} samples, its data now hold {len(samples) - 1}"):
        train(asked, device="cpu")


def test_a_checkpoint_is_what_was_when_it_was_asked_for(tmp_path: Path) -> None:
    """It is written beside the steps that go on and change the weights."""
    model = nn.Linear(1000, 1000)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        model(torch.ones(1000)).sum().backward()
        adam.step()
        adam.zero_grad()

    with ranks("cpu") as here:
        saver = Saver(tmp_path, 2, here)
        step()
        before = model.weight.detach().clone()
        moment = adam.state[model.weight]["exp_avg"].clone()
        saver.save(1, model, adam, {"step": 1})
        for _ in range(3):
            step()
        saver.finish()
        newest = saver.newest()
        assert newest is not None
        assert saver.load(newest, model, adam) == {"step": 1}
    assert torch.equal(model.weight, before)
    assert torch.equal(adam.state[model.weight]["exp_avg"], moment)
    assert adam.state[model.weight]["step"] == 1


# ------------------------------------------------------------------------------------- the folder, and early ends


def test_a_folder_of_something_else_is_left_alone(school: School, tmp_path: Path) -> None:
    thesis = tmp_path / "run" / "model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no run; set out"):
        train(recipe(school, tmp_path / "run"), device="cpu")
    with pytest.raises(ConfigError, match=r"holds no run; set out"):
        train(recipe(school, thesis), device="cpu")
    with pytest.raises(LlavaError, match="can not be written"):
        train(recipe(school, Path("/proc/run")), device="cpu")
    assert command.files(tmp_path / "run") == {"model": thesis.parent.lstat().st_size, "model/thesis.txt": 4}


def test_a_finished_run_of_another_recipe_is_refused(finished: Recipe) -> None:
    with pytest.raises(ConfigError, match="another rate; set out"):
        train(replace(finished, rate=3e-3), device="cpu")


def test_what_killed_runs_left_is_removed_at_the_start(finished: Recipe) -> None:
    out = Path(finished.out)
    (out / "model").rename(out / ".model.partial-12345")
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    train(finished, device="cpu")
    assert not [path for path in out.rglob(".*") if "partial" in path.name]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_one_line_and_the_same_command_goes_on(
    school: School, tmp_path: Path, kind: signal.Signals
) -> None:
    """Sent to all processes, as a terminal does it; workers go, and what was being written is whole."""
    out = tmp_path / "run"
    file = toml(tmp_path / "recipe.toml", recipe(school, out, max_steps=400, save_every=1, workers=2))
    going = command.start("train", file, "--device", "cpu", start_new_session=True)
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(out, 3)() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is training here"):
        train(recipe(school, out, max_steps=400, save_every=1, workers=2), device="cpu")
    os.killpg(going.pid, kind)
    _, told = going.communicate(timeout=training.TIMEOUT_S)
    assert (going.returncode, told.decode()) == (130, "llava: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(going.pid, 0)
    with ranks("cpu") as here:
        newest = Saver(out / "checkpoints", 2, here).newest()
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) >= len(rows(out)) - 2


def test_a_worker_that_is_killed_is_one_line(school: School, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(school, tmp_path / "run", max_steps=4000, save_every=0, workers=1))
    going = command.start("train", file, "--device", "cpu")
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(tmp_path / "run", 2)() and time.monotonic() < end:
        time.sleep(0.01)
    (children,) = Path(f"/proc/{going.pid}/task/{going.pid}").glob("children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, told = going.communicate(timeout=training.TIMEOUT_S)
    assert told.decode().startswith("llava: a worker process was ended")
    assert going.returncode == 2
    assert told.count(b"\n") == 1


def test_a_checkpoint_that_can_not_be_written_is_one_line(school: School, tmp_path: Path) -> None:
    """Files are held to 100 kB, as on a full disk."""
    file = toml(tmp_path / "recipe.toml", recipe(school, tmp_path / "run"))
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command.LLAVA]
    done = command.run("train", file, "--device", "cpu", command=limited)
    command.assert_one_line_error(done, "step-00000002: can not be written", "make room")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_only_matrices_newline_and_class_embedding_decay(school: School, tmp_path: Path) -> None:
    """And of a table of which two rows learn, nothing: its other rows must stay."""
    asked = recipe(school, tmp_path / "a", train=["projector", "decoder", "vision"], weight_decay=0.1)
    trainee, _ = trainee_of(asked)
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    for group in optimizer(trainee, asked).param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            kept = "norm" in name or name.endswith("bias")
            assert group["weight_decay"] == (0 if kept else 0.1), name
    values = from_parts(school) | {"train": ["projector", "rows"], "start_end": True, "weight_decay": 0.5}
    asked = recipe(school, tmp_path / "b", **values)
    trainee, batches = trainee_of(asked)
    table = trainee.model.decoder.embed.weight
    before, adam = table.detach().clone(), optimizer(trainee, asked)
    gradients(trainee, batches[0])
    adam.step()
    assert (table != before).any(1).nonzero()[:, 0].tolist() == trainee.rows.tolist()


# ------------------------------------------------------------------------------------------------- what it refuses


def test_a_loss_that_is_no_number_stops_the_run(school: School, tmp_path: Path) -> None:
    asked = recipe(school, tmp_path / "run", rate=1e30, clip=0, warmup=0)
    with pytest.raises(LlavaError, match=r"^step \d: the loss is (nan|inf) on samples \d+, ") as raised:
        train(asked, device="cpu")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_a_language_model_without_a_tower_is_refused(school: School, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision_tower"):
        train(recipe(school, tmp_path / "run", model=str(school.llama)), device="cpu")


def test_on_two_ranks_an_error_ends_both(school: School, tmp_path: Path) -> None:
    going = begin(recipe(school, tmp_path / "run", rate=1e30, clip=0, warmup=0), ranks=2)
    assert going.wait() == [2, 2]
    assert "the loss is" in going.told.read_text()
