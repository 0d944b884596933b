"""The training loop: compared with transformers and the original, on several ranks, after kill -9, and its errors."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

import llava.train.loss
import llava.train.start
from llava.checkpoint.open import open_checkpoint
from llava.errors import CheckpointError, ConfigError, LlavaError
from llava.formats.llava import from_memory
from llava.model.decoder import Decoder
from llava.preprocess.inputs import ModelInput
from llava.train.batch import collate
from llava.train.distributed import join_world
from llava.train.loop import train
from llava.train.loss import cross_entropy
from llava.train.optim import build_optimizer
from llava.train.recipe import Recipe
from llava.train.resume import Checkpointer
from llava.train.run_folder import _lock
from llava.train.start import start
from tests import command, tiny, training
from tests.golden.test_answers import FOLDERS, TOWERS
from tests.training import (
    LORA,
    Assets,
    begin,
    from_parts,
    gradients,
    losses,
    net_and_dataset,
    recipe,
    rows,
    run_in_background,
)


@pytest.fixture(scope="module")
def assets(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    llava = tiny.write_llava(folder / "llava", clip=clip, torch_dtype="float32", layout="safetensors")
    return training.build_assets(folder, clip, llava)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in background runs, so that sums are computed in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(recipe: Recipe) -> list[float]:
    """Trains in this process and returns the losses."""
    train(recipe, device="cpu")
    return losses(Path(recipe.output_dir))


def raw(model: Path) -> dict[str, Tensor]:
    """The tensors of a folder by their names on disk."""
    if (model / "mm_projector.bin").is_file():
        return torch.load(model / "mm_projector.bin", weights_only=True)
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# ---------------------------------------------------------------------------------------- against transformers


class Plain(nn.Module):
    """LLaVA-1.5 assembled from parts of transformers."""

    def __init__(self, assets: Assets) -> None:
        transformers = pytest.importorskip("transformers")
        super().__init__()
        tensors = raw(assets.llava)
        config = transformers.LlamaConfig.from_pretrained(assets.llama)
        self.llama = transformers.LlamaForCausalLM(config)
        own = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
        self.llama.load_state_dict(own)
        self.tower = transformers.CLIPVisionModel.from_pretrained(assets.clip, dtype=torch.float32).requires_grad_(
            False
        )
        self.mm_projector = nn.Sequential(nn.Linear(tiny.CLIP_DIM, 64), nn.GELU(), nn.Linear(64, 64))
        prefix = "model.mm_projector."
        self.mm_projector.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )

    def forward(self, inputs: list[ModelInput]) -> Tensor:
        """transformers' own loss of right-padded rows."""
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
        """The parameters by their names in a LLaVA checkpoint."""
        projector = {f"model.{name}": p for name, p in self.named_parameters() if name.startswith("mm_projector")}
        return {**dict(self.llama.named_parameters()), **projector}


def plain_loop(model: nn.Module, recipe: Recipe, parameters: list[dict[str, Any]]) -> list[float]:
    """An ordinary training loop with transformers. Returns the losses."""
    transformers = pytest.importorskip("transformers")
    _, dataset = net_and_dataset(recipe)
    n = recipe.max_steps
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(recipe.warmup_ratio * n), n)
    found = []
    for step in range(n):
        loss = model(training.inputs_of(dataset, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


ORACLE = {
    "max_steps": 20,
    "global_batch_size": 6,
    "micro_batch_size": 6,
    "save_every": 0,
    "warmup_ratio": 0.15,
    "lr": 5e-4,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "weight_decay": 0.1},
        {"packing": False, "projector_lr": 1e-3},
        {"packing": True, "train": ["projector"]},
    ],
    ids=["full, packed", "full, padded", "projector"],
)
def test_twenty_steps_equal_a_plain_transformers_loop(assets: Assets, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = recipe(assets, tmp_path / "run", **{**ORACLE, **changes})
    plain = Plain(assets)
    names = {name: p for name, p in plain.named().items() if asked.train != ("projector",) or "projector" in name}
    rate = {True: asked.projector_lr or asked.lr, False: asked.lr}
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
    assert wanted[-1] < wanted[0] - 0.3  # the loss decreases clearly
    trained, start = raw(tmp_path / "run" / "model"), raw(assets.llava)
    assert set(names) <= set(trained)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, names.get(name, start[name]).detach(), rtol=0, atol=1e-4, msg=name)
    assert all((trained[name] - start[name]).abs().max() > 1e-3 for name in names)


# ------------------------------------------------------------------------------------------ against the original

FAMILIES = {"a": "a_v1.5", "b": "b_llama2", "c merged": "c_delta_v0", "d merged": "d_delta_v1.1", "mpt": "f_mpt"}
RUNS = [*range(11), "mpt"]  # of training.json; its twelfth masks everything, so MPT is read from f_mpt


def golden_run(golden: Path, number: int | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of a run, and the projector's gradients by their names on disk."""
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
    here = Assets(folder, folder, folder, data, golden / "images")
    return recipe(here, folder / "run", **values)


@pytest.mark.parametrize("number", RUNS)
def test_losses_and_gradients_equal_the_original(
    golden: Path, golden_checkpoints: Path, tmp_path: Path, number: int | str
) -> None:
    record, projector = golden_run(golden, number)
    asked = golden_recipe(golden, golden_checkpoints, record, tmp_path)
    net, dataset = net_and_dataset(asked)
    wanted = record["sample_losses"]
    for i, loss in enumerate(wanted):
        single = dataset.build([i])
        assert bool(single.skipped) == (loss is None)
        if loss is not None:
            assert net(single).item() / len(single.targets) == pytest.approx(loss, abs=2e-5)
    batch = dataset.build(range(len(wanted)))
    total, grads = gradients(net, batch)
    assert total.item() / len(batch.target_positions) == pytest.approx(record["batch_loss"], abs=2e-5)
    means = {name.removeprefix("model."): grad / len(batch.target_positions) for name, grad in grads.items()}
    ours = {item.name: torch.cat(list(item.chunks())) for item in from_memory(means, net.model.config)}
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


def test_chunked_cross_entropy_equals_that_of_full_logits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava.train.loss, "_CHUNK_VALUES", 97 * 7)
    x, targets = torch.randn(50, 16, requires_grad=True), torch.randint(0, 97, (50,))
    inputs = (x, decoder.head.weight)
    whole = F.cross_entropy(decoder.logits(x), targets, reduction="sum")
    wanted = torch.autograd.grad(whole, inputs)
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    made: list[int] = []
    monkeypatch.setattr(decoder, "logits", lambda x, own=decoder.logits: made.append(len(x)) or own(x))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = cross_entropy(decoder, x, targets)
        found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, wanted)
    assert max(made) == 7  # rows of logits per chunk
    assert len(made) == 2 * 8  # each chunk once in the forward and once in the backward pass
    assert max(held) <= decoder.head.weight.numel()
    assert cross_entropy(decoder, x[:0], targets[:0]) == 0


def test_the_loss_is_the_mean_over_all_tokens_of_the_step(assets: Assets, tmp_path: Path) -> None:
    asked = recipe(assets, tmp_path / "run", max_steps=1, warmup_ratio=0, global_batch_size=6, micro_batch_size=2)
    net, dataset = net_and_dataset(asked)
    inputs = training.inputs_of(dataset, 0)
    single = [collate([one], packing=False, pad_to=1, micro_batch_size=1, max_length=256) for one in inputs]
    counts = [len(batch.target_positions) for batch in single]
    assert len(set(counts)) > 3  # otherwise the mean of means would be the same
    net.eval()
    assert run(asked) == pytest.approx([sum(net(b).item() for b in single) / sum(counts)], abs=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_do_not_change_the_result(assets: Assets, tmp_path: Path, packing: bool) -> None:
    runs = [recipe(assets, tmp_path / str(n), micro_batch_size=n, packing=packing) for n in (1, 2, 6)]
    one, two, six = map(run, runs)
    assert one == pytest.approx(six, abs=1e-5)
    assert two == pytest.approx(six, abs=1e-5)


# ------------------------------------------------------------------------------------------------- how it runs


@pytest.fixture(scope="module")
def usual(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[float]]:
    """A run that other runs are compared with."""
    torch.set_num_threads(1)
    asked = recipe(assets, tmp_path_factory.mktemp("usual") / "run", max_steps=8)
    return asked, run(asked)


def again(usual: tuple[Recipe, list[float]], out: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """The losses with some changes to the recipe, and the usual ones."""
    return run(replace(usual[0], output_dir=str(out), **changes)), usual[1]


def test_gradient_checkpointing_does_not_change_the_losses(usual: tuple[Recipe, list[float]], tmp_path: Path) -> None:
    ours, wanted = again(usual, tmp_path / "run", gradient_checkpointing=True)
    assert ours == wanted


def test_worker_processes_do_not_change_the_losses(usual: tuple[Recipe, list[float]], tmp_path: Path) -> None:
    ours, wanted = again(usual, tmp_path / "run", num_workers=2)
    assert ours == wanted


@pytest.mark.parametrize(("param_dtype", "tolerance"), [("float32", 0.05), ("bfloat16", 0.25)])
def test_bfloat16_stays_near_float32(
    usual: tuple[Recipe, list[float]], tmp_path: Path, param_dtype: str, tolerance: float
) -> None:
    ours, wanted = again(usual, tmp_path / "run", compute_dtype="bfloat16", param_dtype=param_dtype)
    assert ours == pytest.approx(wanted, abs=tolerance)
    assert ours != wanted


def test_trained_weights_are_float32_under_bfloat16_compute(assets: Assets, tmp_path: Path) -> None:
    """An update of 1e-6 is lost in bfloat16 but not in float32."""
    changed = {}
    for param_dtype in ("float32", "bfloat16"):
        asked = recipe(
            assets,
            tmp_path / param_dtype,
            compute_dtype="bfloat16",
            param_dtype=param_dtype,
            lr=1e-6,
            max_steps=2,
            warmup_ratio=0,
        )
        before, _ = net_and_dataset(asked)
        train(asked, device="cpu")
        after, _ = net_and_dataset(asked)
        restore(asked, after)
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        changed[param_dtype] = sum(int((a != b).sum()) for a, b in pairs if a.requires_grad)
        assert {p.dtype for p in after.parameters() if p.requires_grad} == {getattr(torch, param_dtype)}
    assert changed["float32"] > 100 * max(changed["bfloat16"], 1)


@pytest.mark.parametrize("packing", [True, False])
def test_compiled_equals_eager(assets: Assets, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the aot_eager backend, which traces like the compiler but skips the slow code generation."""
    compiled = []
    traced = partial(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or traced(self))
    values = {"max_steps": 3, "packing": packing, "gradient_checkpointing": True}
    eager = run(recipe(assets, tmp_path / "eager", **values))
    assert run(recipe(assets, tmp_path / "compiled", compile=True, **values)) == pytest.approx(eager, abs=1e-4)
    assert len(compiled) == 2 + 2  # blocks of decoder and tower


def restore(recipe: Recipe, net: llava.train.loss.LlavaWithLoss) -> None:
    """Loads the last checkpoint of a run into `net`."""
    with join_world("cpu") as world:
        checkpointer = Checkpointer(Path(recipe.output_dir) / "checkpoints", recipe.keep_last, world)
        latest = checkpointer.latest()
        assert latest is not None
        checkpointer.load(latest, net, build_optimizer(net, recipe))


def test_a_trained_tower_has_its_own_lr_and_is_exported(assets: Assets, tmp_path: Path) -> None:
    parts = ["projector", "decoder", "vision"]
    asked = recipe(assets, tmp_path / "run", train=parts, vision_lr=1e-5, projector_lr=1e-2, lr=1e-3)
    net, _ = net_and_dataset(asked)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    model = train(asked, device="cpu")
    restore(asked, net)
    after = dict(net.model.named_parameters())
    moved = {name: (after[name] - p).abs().max().item() for name, p in before.items()}
    total = sum(row["lr"] for row in rows(tmp_path / "run"))
    for name, distance in moved.items():
        share = {"vision": 1e-2, "projector": 10, "decoder": 1}[name.partition(".")[0]]
        assert 0 < distance < 2 * share * total, name  # an Adam update is about lr in size
    written = training.weights(model)
    assert set(written) == set(after)
    for name, tensor in written.items():
        assert torch.equal(tensor, after[name]), name


def test_an_export_has_the_trained_weights_in_the_dtype_of_its_model(assets: Assets, tmp_path: Path) -> None:
    half = tiny.write_llava(tmp_path / "half", clip=assets.clip)  # float16
    for model, dtype in ((assets.llava, torch.float32), (half, torch.float16)):
        asked = recipe(assets, tmp_path / str(dtype), model=str(model), compute_dtype="bfloat16", max_steps=3)
        written = open_checkpoint(train(asked, device="cpu")).tensors
        net, _ = net_and_dataset(asked)
        restore(asked, net)
        for name, p in net.model.named_parameters():
            if p.requires_grad:
                assert torch.equal(written[name].read(), p.detach().to(dtype)), name


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_only_the_start_and_end_rows_of_a_frozen_language_model_are_trained(
    assets: Assets, tmp_path: Path, kind: str
) -> None:
    values = from_parts(assets) | {"train": ["projector", "rows"], "start_end": True, "save_every": 0}
    if kind == "mpt":  # its head is tied to the embedding table and must stay frozen too
        values |= {"model": str(tiny.write_mpt(tmp_path / "mpt", torch_dtype="float32")), "template": "mpt"}
    asked = recipe(assets, tmp_path / "run", **values)
    train(asked, device="cpu")
    net, _ = net_and_dataset(asked)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    restore(asked, net)
    changed = {name for name, p in net.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder.embed.weight"} | {name for name in before if name.startswith("projector")}
    table = net.model.decoder.embed.weight
    different = (table != before["decoder.embed.weight"]).any(1).nonzero()[:, 0].tolist()
    assert different == net.trained_rows.tolist()


# ------------------------------------------------------------------------------------------------------- ranks

SPREAD = {
    "full, tower too, text-only ranks": {
        "train": ["projector", "decoder", "vision"],
        "global_batch_size": 3,
        "micro_batch_size": 1,
    },
    "QLoRA": {
        **LORA,
        "quantize_base": "nf4",
        "lora_dropout": 0.3,
        "micro_batch_size": 2,
        "order": "by_modality_length",
    },
    "projector and rows": {"train": ["projector", "rows"], "start_end": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", SPREAD)
def test_the_number_of_ranks_does_not_change_the_result(assets: Assets, tmp_path: Path, case: str) -> None:
    """Some micro-batches have no image, and some ranks have no micro-batch."""
    values = SPREAD[case]
    one = recipe(assets, tmp_path / "one", **values)
    wanted = run(one)
    for n in (2,) if case == "QLoRA" else (3,):
        some = recipe(assets, tmp_path / f"on{n}", **values)
        run_in_background(some, ranks=n)
        assert losses(tmp_path / f"on{n}") == pytest.approx(wanted, abs=1e-5)
        for row, other in zip(rows(tmp_path / f"on{n}"), rows(tmp_path / "one"), strict=True):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert [row[k] for k in ("tokens", "target_tokens", "samples")] == [
                other[k] for k in ("tokens", "target_tokens", "samples")
            ]
        found, expected = (stored(tmp_path / name / "model") for name in (f"on{n}", "one"))
        assert set(found) == set(expected)
        for name, tensor in found.items():
            if not name.endswith("k_proj.bias"):  # the loss does not depend on it, so Adam amplifies rounding errors
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    if case.startswith("full"):
        _, dataset = net_and_dataset(one)
        kinds = [
            {dataset.samples.lengths[i] > 0 for p in dataset.order.micro_batches(s) for i in p.samples}
            for s in range(6)
        ]
        assert {True, False} in kinds


def test_ranks_may_write_the_tokenizer_at_the_same_time(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = llava.train.start._write_tokenizer

    def after_another(*args: Any) -> None:
        write(*args)  # as another rank does
        write(*args)

    monkeypatch.setattr(llava.train.start, "_write_tokenizer", after_another)
    values = from_parts(assets) | {"train": ["projector", "rows"], "start_end": True}
    found = start(recipe(assets, tmp_path / "run", **values), tmp_path / "tokenizer")
    assert found.tokenizer.id_of("<im_end>") == tiny.PIECES + 2


def stored(model: Path) -> dict[str, Tensor]:
    """All tensors in all files of a model."""
    found = {}
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        found |= {f"{file.name}: {name}": tensor for name, tensor in tensors.items()}
    return found


def test_tied_weights_stay_tied_on_two_ranks(assets: Assets, tmp_path: Path) -> None:
    llama = tiny.write_llama(tmp_path / "tied", tie_word_embeddings=True, torch_dtype="float32")
    values = {"model": str(llama), "vision_tower": str(assets.clip), "max_steps": 4}
    wanted = run(recipe(assets, tmp_path / "one", **values))
    run_in_background(recipe(assets, tmp_path / "two", **values), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(wanted, abs=1e-5)
    written = training.weights(tmp_path / "two" / "model")
    before = training.weights(llama)
    for name, tensor in training.weights(tmp_path / "one" / "model").items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert (written["decoder.embed.weight"] - before["decoder.embed.weight"]).abs().max() > 1e-4


def test_two_ranks_in_bfloat16_stay_close_to_one(assets: Assets, tmp_path: Path) -> None:
    """FSDP computes everything in bfloat16. A single rank keeps the residual stream in float32."""
    values = {"compute_dtype": "bfloat16", "train": ["projector", "decoder", "vision"], "max_steps": 4}
    wanted = run(recipe(assets, tmp_path / "one", **values))
    run_in_background(recipe(assets, tmp_path / "two", **values), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(wanted, abs=0.05)


@pytest.mark.slow
def test_the_command_runs_under_torchrun(assets: Assets, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "two", max_steps=3, num_workers=1))
    torchrun = [command.sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = command.run("train", file, "--device", "cpu", command=[*torchrun, "-m", "llava.cli"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the trained model") == 1
    assert losses(tmp_path / "two") == pytest.approx(run(recipe(assets, tmp_path / "one", max_steps=3)), abs=1e-5)


def toml(file: Path, recipe: Recipe) -> Path:
    """Writes a recipe to its file."""
    values = {key: value for key, value in training.to_dict(recipe).items() if value not in (None, ())}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


# -------------------------------------------------------------------------------------------------- after kill -9

STAGES = {
    "stage 1": {"train": ["projector"], "lr": 1e-2},
    "stage 2": {"packing": False},
    "LoRA with dropout": {**LORA, "lora_dropout": 0.5},
}
LONG = {"max_steps": 12, "save_every": 1, "global_batch_size": 3, "micro_batch_size": 1, "order": "by_modality_length"}


def until(moment: Any, run: training.Background) -> None:
    """Waits for a moment and kills the run, which must not have finished."""
    end = time.monotonic() + training.TIMEOUT_S
    while not moment() and all(process.is_alive() for process in run.processes) and time.monotonic() < end:
        time.sleep(0.001)
    assert moment(), run.output.read_text()
    run.kill()
    assert [process.exitcode for process in run.processes] == [-9] * len(run.processes)


def at_step(out: Path, step: int) -> Any:
    return lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") >= step


def while_saving(out: Path, step: int) -> Any:
    return lambda: any(path.name >= f".step-{step:08}" for path in (out / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_with_identical_results(assets: Assets, tmp_path: Path, stage: str) -> None:
    values = LONG | STAGES[stage]
    wanted = run(recipe(assets, tmp_path / "whole", **values))
    out = tmp_path / "killed"
    asked = recipe(assets, out, **values)
    until(at_step(out, random.Random(stage).randint(1, 4)), begin(asked))
    until(while_saving(out, random.Random(stage).randint(7, 10)), begin(asked))
    left = len(list((out / "checkpoints").glob("step-*")))
    assert 1 <= left <= 3
    run_in_background(asked)
    assert losses(out) == wanted
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-00000011", "step-00000012"]
    for key in ("samples", "tokens", "lr", "epoch"):
        assert [row[key] for row in rows(out)] == [row[key] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize(("stage", "before", "after"), [("stage 2", 2, 1), ("LoRA with dropout", 1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(
    assets: Assets, tmp_path: Path, stage: str, before: int, after: int
) -> None:
    values = LONG | STAGES[stage] | {"max_steps": 10, "micro_batch_size": 1, "global_batch_size": 2}
    wanted = run(recipe(assets, tmp_path / "whole", **values))
    out = tmp_path / "killed"
    asked = recipe(assets, out, **values)
    until(at_step(out, 5), begin(asked, ranks=before))
    assert list((out / "checkpoints").glob("step-*"))
    run_in_background(asked, ranks=after)
    assert losses(out) == pytest.approx(wanted, abs=1e-5)
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.fixture
def finished(usual: tuple[Recipe, list[float]], tmp_path: Path) -> Recipe:
    """A copy of the usual run that a test may modify."""
    shutil.copytree(usual[0].output_dir, tmp_path / "run")
    asked = replace(usual[0], output_dir=str(tmp_path / "run"))
    file = tmp_path / "run" / "recipe.json"
    file.write_text(file.read_text().replace(usual[0].output_dir, asked.output_dir))
    return asked


def test_a_finished_run_is_reported_and_left_unchanged(finished: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    before = command.files(Path(finished.output_dir))
    assert train(finished, device="cpu") == Path(finished.output_dir) / "model"
    assert "already finished" in caplog.text
    assert command.files(Path(finished.output_dir)) == before


def test_a_run_killed_during_export_only_exports_again(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    before, log = stored(out / "model"), (out / "log.jsonl").read_bytes()
    shutil.rmtree(out / "model")
    train(finished, device="cpu")
    after = stored(out / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [json.loads(a)["loss"] for a in log.splitlines()] == losses(out)


def test_a_partial_checkpoint_is_not_loaded(usual: tuple[Recipe, list[float]], finished: Recipe) -> None:
    out = Path(finished.output_dir)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    last.rename(last.with_name(f".{last.name}.partial"))
    for whole in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(whole)
    next((out / "checkpoints").glob(".step-*/*.distcp")).write_bytes(b"incomplete")
    train(finished, device="cpu")
    assert losses(out) == usual[1]


def test_a_damaged_checkpoint_is_named(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    file = next(last.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{last.name}.*remove it") as raised:
        train(finished, device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 2e-3}, "lr"),
        ({"seed": 1}, "seed"),
        ({"global_batch_size": 3}, "global_batch_size"),
        ({"packing": False}, "packing"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(finished: Recipe, changes: dict[str, Any], key: str) -> None:
    shutil.rmtree(Path(finished.output_dir) / "model")
    with pytest.raises(ConfigError, match=f"another {key}; set output_dir="):
        train(replace(finished, **changes), device="cpu")


def test_changed_data_at_the_same_path_is_refused(assets: Assets, tmp_path: Path) -> None:
    samples = json.loads(assets.data.read_text())
    (tmp_path / "data.json").write_text(json.dumps(samples))
    asked = recipe(assets, tmp_path / "run", data=str(tmp_path / "data.json"))
    train(asked, device="cpu")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "data.json").write_text(json.dumps(samples[:-1]))
    with pytest.raises(
        ConfigError, match=f"started on {len(samples)} samples, but its data now contains {len(samples) - 1}"
    ):
        train(asked, device="cpu")


def test_a_checkpoint_holds_the_state_at_the_time_of_save(tmp_path: Path) -> None:
    """It is written in the background while further steps change the weights."""
    model = nn.Linear(1000, 1000)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        model(torch.ones(1000)).sum().backward()
        adam.step()
        adam.zero_grad()

    with join_world("cpu") as world:
        checkpointer = Checkpointer(tmp_path, 2, world)
        step()
        before = model.weight.detach().clone()
        moment = adam.state[model.weight]["exp_avg"].clone()
        checkpointer.save(1, model, adam, {"step": 1})
        for _ in range(3):
            step()
        checkpointer.finish()
        latest = checkpointer.latest()
        assert latest is not None
        assert checkpointer.load(latest, model, adam) == {"step": 1}
    assert torch.equal(model.weight, before)
    assert torch.equal(adam.state[model.weight]["exp_avg"], moment)
    assert adam.state[model.weight]["step"] == 1


# ------------------------------------------------------------------------------------- the folder, and early ends


def test_a_folder_with_other_files_is_refused_and_not_touched(assets: Assets, tmp_path: Path) -> None:
    thesis = tmp_path / "run" / "model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    with pytest.raises(ConfigError, match=r"not the folder of a run; set output_dir="):
        train(recipe(assets, tmp_path / "run"), device="cpu")
    with pytest.raises(ConfigError, match=r"not the folder of a run; set output_dir="):
        train(recipe(assets, thesis), device="cpu")
    with pytest.raises(LlavaError, match="cannot be written"):
        train(recipe(assets, Path("/proc/run")), device="cpu")
    assert command.files(tmp_path / "run") == {"model": thesis.parent.lstat().st_size, "model/thesis.txt": 4}


def test_a_finished_run_of_another_recipe_is_refused(finished: Recipe) -> None:
    with pytest.raises(ConfigError, match="another lr; set output_dir="):
        train(replace(finished, lr=3e-3), device="cpu")


def test_partial_files_of_killed_runs_are_removed_at_the_start(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    (out / "model").rename(out / ".model.partial-12345")
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    train(finished, device="cpu")
    assert not [path for path in out.rglob(".*") if "partial" in path.name]


HOLDER = """if True:
    import os, sys, time
    from pathlib import Path
    from llava.train.run_folder import _lock
    with _lock(Path(sys.argv[1])):
        if os.fork() == 0:
            time.sleep(60)
        print(os.getpid(), flush=True)
        time.sleep(60)"""


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    argv = [command.sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=command.PROJECT, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert int(holder.stdout.readline()) == holder.pid
        with pytest.raises(ConfigError, match="another process is training here"), _lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with _lock(tmp_path):
            os.killpg(holder.pid, 0)  # the forked process is still alive
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(self: FileLock) -> None:
        raise error

    monkeypatch.setattr(FileLock, "_acquire", fail)
    with _lock(tmp_path):
        pass
    (record,) = caplog.records
    assert "cannot be locked" in record.message


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line_and_a_complete_checkpoint(
    assets: Assets, tmp_path: Path, kind: signal.Signals
) -> None:
    """The signal goes to all processes, as from a terminal. Workers exit, and a checkpoint in progress is completed."""
    out = tmp_path / "run"
    file = toml(tmp_path / "recipe.toml", recipe(assets, out, max_steps=400, save_every=1, num_workers=2))
    going = command.start("train", file, "--device", "cpu", start_new_session=True)
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(out, 3)() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is training here"):
        train(recipe(assets, out, max_steps=400, save_every=1, num_workers=2), device="cpu")
    os.killpg(going.pid, kind)
    _, stderr = going.communicate(timeout=training.TIMEOUT_S)
    assert (going.returncode, stderr.decode()) == (130, "llava: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(going.pid, 0)
    with join_world("cpu") as world:
        latest = Checkpointer(out / "checkpoints", 2, world).latest()
    assert latest is not None
    assert int(latest.name.removeprefix("step-")) >= len(rows(out)) - 2


def test_a_killed_worker_is_reported_in_one_line(assets: Assets, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run", max_steps=4000, save_every=0, num_workers=1))
    going = command.start("train", file, "--device", "cpu")
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(tmp_path / "run", 2)() and time.monotonic() < end:
        time.sleep(0.01)
    (children,) = Path(f"/proc/{going.pid}/task/{going.pid}").glob("children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, stderr = going.communicate(timeout=training.TIMEOUT_S)
    assert stderr.decode().startswith("llava: a data loading process was killed")
    assert going.returncode == 2
    assert stderr.count(b"\n") == 1


def test_a_checkpoint_that_cannot_be_written_is_one_line(assets: Assets, tmp_path: Path) -> None:
    """ulimit caps files at 100 kB, in place of a full disk."""
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run"))
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command.LLAVA]
    done = command.run("train", file, "--device", "cpu", command=limited)
    command.assert_one_line_error(done, "step-00000002: cannot be written", "free some space")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_weight_decay_applies_to_matrices_newline_and_class_embedding(assets: Assets, tmp_path: Path) -> None:
    """An embedding table with two trained rows is exempt, because its other rows must not change."""
    asked = recipe(assets, tmp_path / "a", train=["projector", "decoder", "vision"], weight_decay=0.1)
    net, _ = net_and_dataset(asked)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for group in build_optimizer(net, asked).param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            exempt = "norm" in name or name.endswith("bias")
            assert group["weight_decay"] == (0 if exempt else 0.1), name
    values = from_parts(assets) | {"train": ["projector", "rows"], "start_end": True, "weight_decay": 0.5}
    asked = recipe(assets, tmp_path / "b", **values)
    net, dataset = net_and_dataset(asked)
    table = net.model.decoder.embed.weight
    before, adam = table.detach().clone(), build_optimizer(net, asked)
    gradients(net, dataset[0])
    adam.step()
    assert (table != before).any(1).nonzero()[:, 0].tolist() == net.trained_rows.tolist()


# ------------------------------------------------------------------------------------------------- what it refuses


def test_a_loss_that_is_not_finite_stops_the_run(assets: Assets, tmp_path: Path) -> None:
    asked = recipe(assets, tmp_path / "run", lr=1e30, max_grad_norm=0, warmup_ratio=0)
    with pytest.raises(LlavaError, match=r"^step \d: the loss is (nan|inf) on samples \d+, ") as raised:
        train(asked, device="cpu")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_a_language_model_without_a_tower_is_refused(assets: Assets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision_tower"):
        train(recipe(assets, tmp_path / "run", model=str(assets.llama)), device="cpu")


def test_an_error_on_two_ranks_ends_both(assets: Assets, tmp_path: Path) -> None:
    going = begin(recipe(assets, tmp_path / "run", lr=1e30, max_grad_norm=0, warmup_ratio=0), ranks=2)
    assert going.wait() == [2, 2]
    assert "the loss is" in going.output.read_text()
