"""The training loop, compared with a plain transformers loop and with the original, and its options."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.checkpoint.open import open_checkpoint
from llava.errors import ConfigError, LlavaError
from llava.formats.llava import from_memory
from llava.train.batch import collate
from llava.train.loop import train
from llava.train.recipe import Recipe
from tests import tiny, training
from tests.golden.test_answers import FOLDERS, TOWERS
from tests.train.plain import Plain, plain_loop, raw
from tests.training import Assets, from_parts, gradients, losses, net_and_dataset, recipe, restore, rows, run

# ------------------------------------------------------------------------------------ compared with transformers


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


# ------------------------------------------------------------------------------------ compared with the original


FAMILIES = {"a": "a_v1.5", "b": "b_llama2", "c merged": "c_delta_v0", "d merged": "d_delta_v1.1", "mpt": "f_mpt"}


RUNS = [*range(11), "mpt"]  # runs of training.json; its twelfth masks everything, so MPT is read from f_mpt


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


# ------------------------------------------------------------------------------------------------------- options


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


def again(usual: tuple[Recipe, list[float]], out: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """The losses with some changes to the recipe, and the usual ones."""
    return run(replace(usual[0], output_dir=str(out), **changes)), usual[1]


def test_gradient_checkpointing_does_not_change_the_losses(usual: tuple[Recipe, list[float]], tmp_path: Path) -> None:
    ours, wanted = again(usual, tmp_path / "run", gradient_checkpointing=True)
    assert ours == wanted


def test_a_recipe_without_num_workers_is_trained_without_a_warning(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    train(replace(recipe(assets, tmp_path / "run", max_steps=1), num_workers=None), device="cpu")
    assert not [record.message for record in caplog.records if "num_workers" in record.message]


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


def test_a_loss_that_is_not_finite_stops_the_run(assets: Assets, tmp_path: Path) -> None:
    asked = recipe(assets, tmp_path / "run", lr=1e30, max_grad_norm=0, warmup_ratio=0)
    with pytest.raises(LlavaError, match=r"^step \d: the loss is (nan|inf) on samples \d+, ") as raised:
        train(asked, device="cpu")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


# -------------------------------------------------------------------------------------- trained parts and export


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


def test_a_language_model_without_a_tower_is_refused(assets: Assets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision_tower"):
        train(recipe(assets, tmp_path / "run", model=str(assets.llama)), device="cpu")
