"""Sample order, packing, and the handling of broken samples."""

import json
import random
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava.config import IGNORE, IMAGE
from llava.data.check import check
from llava.data.measure import open_measure
from llava.errors import ConfigError, DataError
from llava.preprocess.inputs import ModelInput
from llava.train.batch import Batch, BatchDataset, collate
from llava.train.loop import train
from llava.train.loss import LlavaWithLoss, attention_context
from llava.train.order import SampleOrder, by_modality_length
from llava.train.plan import make_plan
from llava.train.start import start
from tests import command, tiny, training
from tests.data.test_layouts import UNSUPPORTED
from tests.training import Assets, gradients, net_and_dataset, recipe, rows, sample, write_data


@pytest.fixture(scope="module")
def assets(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    return training.build_assets(folder, clip, tiny.write_llava(folder / "llava", clip=clip))


# ------------------------------------------------------------------------------------------------------ packing

SIZES: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_key_value_heads": 2},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 16.0}, "max_position_embeddings": 32},
}


@pytest.fixture(scope="module", params=["llama", "grouped heads", "dynamic rope", "anyres", "mpt"])
def trained(
    request: pytest.FixtureRequest, assets: Assets, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlavaWithLoss, BatchDataset]:
    folder = tmp_path_factory.mktemp("trained")
    if request.param == "mpt":
        model = tiny.write_mpt(folder / "model", clip=assets.clip)
        changes: dict[str, Any] = {"template": "mpt", "start_end": True}
    elif request.param == "anyres":
        model = tiny.write_llava(folder / "model", clip=assets.clip, **tiny.ANYRES)
        changes = {"aspect": "anyres", "pinpoints": tiny.ANYRES["image_grid_pinpoints"]}
    else:
        model, changes = tiny.write_llava(folder / "model", clip=assets.clip, **SIZES.get(request.param, {})), {}
    values = {"model": str(model), "train": ["projector", "decoder", "vision"], "max_length": 512}
    return net_and_dataset(recipe(assets, folder / "run", **values, **changes))


def packed(inputs: list[ModelInput], pad_to: int = 32) -> Batch:
    return collate(inputs, packing=True, pad_to=pad_to, micro_batch_size=len(inputs) + 1, max_length=512)


def padded(inputs: list[ModelInput]) -> Batch:
    return collate(inputs, packing=False, pad_to=1, micro_batch_size=len(inputs), max_length=512)


def each_loss(net: LlavaWithLoss, batch: Batch, inputs: list[ModelInput]) -> list[Tensor]:
    """-log p of the targets of a packed row, split by sample."""
    x = net.model.decoder(net.embed(batch), attention_context(batch))
    logits = net.model.decoder.logits(x[0, batch.target_positions])
    each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    return list(each.split([int((one.labels[1:] != IGNORE).sum()) for one in inputs]))


@pytest.mark.parametrize("join", [packed, padded])
def test_a_batch_gives_the_loss_and_gradients_of_its_samples(
    trained: tuple[LlavaWithLoss, BatchDataset], join: Any
) -> None:
    net, dataset = trained
    inputs = [dataset.prepare(i) for i in (0, 1, 2, 5, 7, 8)]
    assert {one.pixels is None for one in inputs} == {True, False}
    loss, grads = gradients(net, join(inputs))
    wanted = torch.zeros(())
    sums = {name: torch.zeros_like(p) for name, p in net.named_parameters() if p.requires_grad}
    for one in inputs:
        own, parts = gradients(net, padded([one]))
        wanted += own
        for name, grad in parts.items():
            sums[name] += grad
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert set(grads) == set(sums)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sums[name], rtol=1e-3, atol=2e-5 * max(1, sums[name].abs().max().item()))


def test_samples_of_a_packed_row_do_not_see_each_other(trained: tuple[LlavaWithLoss, BatchDataset]) -> None:
    net, dataset = trained
    inputs = [dataset.prepare(i) for i in (2, 0, 8, 1)]
    with torch.no_grad():
        before = each_loss(net, packed(inputs), inputs)
        changed = inputs[1]
        ids = torch.where(changed.ids == IMAGE, changed.ids, (changed.ids + 7) % 400)
        assert changed.pixels is not None
        other = ModelInput(**{**vars(changed), "ids": ids, "pixels": -changed.pixels})
        swapped = [inputs[0], other, *inputs[2:]]
        after = each_loss(net, packed(swapped), swapped)
    assert not torch.equal(before[1], after[1])
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])


def test_positions_restart_and_no_target_crosses_a_sample_boundary(
    trained: tuple[LlavaWithLoss, BatchDataset],
) -> None:
    _, dataset = trained
    inputs = [dataset.prepare(i) for i in (0, 2, 1)]
    batch = packed(inputs)
    assert batch.ids.shape[0] == 1
    assert batch.ids.shape[1] % 32 == 0
    assert batch.n_tokens == sum(len(one.ids) for one in inputs)
    start, targets = 0, []
    for one in inputs:
        assert batch.positions[0, start : start + len(one.ids)].tolist() == list(range(len(one.ids)))
        targets += [(start + i, one.labels[i + 1]) for i in range(len(one.ids) - 1) if one.labels[i + 1] != IGNORE]
        start += len(one.ids)
    assert list(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True)) == [
        (a, int(b)) for a, b in targets
    ]
    assert batch.segments is not None
    assert len(batch.segments.cu_seqlens) == len(inputs) + 3  # 3 samples, one free slot, the padding, and the leading 0


@pytest.mark.parametrize("packing", [True, False])
def test_an_empty_micro_batch_gives_zero_gradients(assets: Assets, tmp_path: Path, packing: bool) -> None:
    """A rank without samples or images still runs every part of the model, as FSDP needs."""
    values = {"train": ["projector", "decoder", "vision"], "packing": packing}
    net, dataset = net_and_dataset(recipe(assets, tmp_path / "run", **values))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    loss, grads = gradients(net, dataset.build(()))
    assert loss == 0
    assert set(grads) == trained
    assert all(grad.abs().max() == 0 for grad in grads.values())
    text, grads = gradients(net, dataset.build([i for i, n in enumerate(dataset.samples.lengths) if n < 0][:2]))
    assert text > 0
    assert set(grads) == trained
    seen = {name for name, grad in grads.items() if grad.abs().max() > 0}
    assert not any(name.startswith(("model.vision", "model.projector")) for name in seen)


# ------------------------------------------------------------------------------------------------------ the order


def original_order(lengths: list[int], size: int, world: int, generator: torch.Generator) -> list[int]:
    """An independent implementation of the original's `group_by_modality_length`."""
    if all(n > 0 for n in lengths) or all(n < 0 for n in lengths):
        return grouped([abs(n) for n in lengths], size, world, generator)
    megabatches: list[list[list[int]]] = []
    for sign in (1, -1):
        own = [i for i in range(len(lengths)) if lengths[i] * sign > 0]
        order = [own[j] for j in grouped([lengths[i] * sign for i in own], size, world, generator)]
        megabatches.append([order[i : i + world * size] for i in range(0, len(order), world * size)])
    rest = megabatches[0].pop() + megabatches[1].pop()
    whole = megabatches[0] + megabatches[1]
    shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    return [i for megabatch in [*shuffled, sorted(rest)] for i in megabatch]


def grouped(lengths: list[int], size: int, world: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(lengths), generator=generator).tolist()
    result = []
    while order:
        chunk, order = order[: world * size], order[world * size :]
        chunk.sort(key=lambda i: -lengths[i])
        if len(chunk) % world:
            result += [i for k in range(world) for i in chunk[k::world]]
            continue
        shares: list[list[int]] = [[] for _ in range(world)]
        for i in chunk:
            open_shares = [share for share in shares if len(share) < len(chunk) // world]
            min(open_shares, key=lambda share: sum(lengths[j] for j in share)).append(i)
        result += [i for share in shares for i in share]
    return result


def some_lengths(seed: int, n: int, text_share: float) -> list[int]:
    choose = random.Random(seed)
    return [choose.randint(1, 60) * (-1 if choose.random() < text_share else 1) for _ in range(n)]


@pytest.mark.parametrize("seed", range(12))
def test_order_by_modality_length_equals_the_original(seed: int) -> None:
    n, size, world = 17 + 31 * seed, 1 + seed % 4, 1 + seed % 5
    lengths = some_lengths(seed, n, (0.0, 0.4, 1.0, 0.1)[seed % 4])
    ours = by_modality_length(lengths, size, world, torch.Generator().manual_seed(seed))
    assert ours == original_order(lengths, size, world, torch.Generator().manual_seed(seed))


def test_order_by_modality_length_has_steps_of_one_modality_and_similar_length(assets: Assets, tmp_path: Path) -> None:
    lengths = some_lengths(1, 500, 0.3)
    asked = recipe(assets, tmp_path, global_batch_size=24, micro_batch_size=4, order="by_modality_length", max_steps=0)
    order = SampleOrder(asked, lengths)
    steps = [order.micro_batches(i) for i in range(order.n_steps)]
    assert Counter(i for step in steps for micro_batch in step for i in micro_batch.samples) == Counter(range(500))
    kinds = [{lengths[i] > 0 for micro_batch in step for i in micro_batch.samples} for step in steps]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {True} in kinds
    assert {False} in kinds
    for step in steps[:-2]:
        sums = [sum(abs(lengths[i]) for i in micro_batch.samples) for micro_batch in step]
        assert max(sums) - min(sums) <= 60  # they differ by at most one sample


@pytest.mark.parametrize("kind", ["shuffled", "by_modality_length"])
def test_every_epoch_has_each_sample_once_in_a_different_order(assets: Assets, tmp_path: Path, kind: str) -> None:
    lengths = some_lengths(2, 103, 0.3)
    asked = recipe(assets, tmp_path, global_batch_size=12, micro_batch_size=3, order=kind, epochs=3, max_steps=0)
    order = SampleOrder(asked, lengths)
    assert (order.steps_per_epoch, order.n_steps) == (9, 27)
    epochs = [[i for s in range(9) for p in order.micro_batches(9 * e + s) for i in p.samples] for e in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert SampleOrder(asked, lengths).micro_batches(20) == order.micro_batches(20)  # depends only on the step
    assert order.micro_batches(3) == SampleOrder(asked, lengths).micro_batches(3)
    assert all(len(p.samples) <= 3 for s in range(27) for p in order.micro_batches(s))


def test_ranks_share_the_micro_batches_of_a_step(assets: Assets, tmp_path: Path) -> None:
    asked = recipe(assets, tmp_path, global_batch_size=10, micro_batch_size=2, max_steps=7)
    _, one = net_and_dataset(asked)
    for ranks in (2, 3, 7):
        parts = [
            BatchDataset(one.samples, one.preprocessor, asked, one.order, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        assert len({len(part) for part in parts}) == 1
        for step in range(2):
            per_step = parts[0].per_step
            seen = [parts[r][step * per_step + turn] for turn in range(per_step) for r in range(ranks)]
            whole = [one[step * one.per_step + turn] for turn in range(one.per_step)]
            assert [b.n_samples for b in seen if b.n_samples] == [b.n_samples for b in whole]
            full = [b for b in seen if b.n_samples]
            assert all(torch.equal(a.ids, b.ids) for a, b in zip(full, whole, strict=True))


# ----------------------------------------------------------------------------------------------- broken samples


def with_broken(assets: Assets, folder: Path, n: int, bad: dict[int, Any]) -> Assets:
    """Assets with n samples, some of them broken."""
    choose = random.Random(3)
    samples = [sample(choose, i, with_picture=i % 2 == 0) for i in range(n)]
    for i, change in bad.items():
        samples[i] |= change
    folder.mkdir()
    (assets.images / "broken.png").write_bytes((assets.images / "0.png").read_bytes()[:70])
    data = write_data(folder / "data.json", samples)
    return Assets(assets.llama, assets.clip, assets.llava, data, assets.images)


BROKEN = {
    "a broken picture": {"image": "broken.png"},
    "a missing picture": {"image": "nowhere.png"},
    "no answer": {"image": None, "conversations": [{"from": "human", "value": "What is it?"}]},
    "no turns": {"conversations": []},
    "a picture that does not fit": {
        "conversations": [{"from": "human", "value": "long " * 300 + "<image>"}, {"from": "gpt", "value": "yes"}]
    },
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_skipped_counted_and_named(
    assets: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    bad = {key: value for key, value in BROKEN[kind].items() if value is not None}
    here = with_broken(assets, tmp_path / "data", 100, {40: bad})
    if "image" in BROKEN[kind] and BROKEN[kind]["image"] is None:
        drop_key(here.data, 40, "image")
    changes = {"image_place": "as_written"} if "fit" in kind else {}
    asked = recipe(here, tmp_path / "run", epochs=1, max_steps=0, global_batch_size=20, micro_batch_size=10, **changes)
    train(asked, device="cpu")
    last = rows(tmp_path / "run")[-1]
    assert (last["samples"], last["skipped"]) == (99, 1)
    named = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(named) == 1
    assert "s40" in named[0] or "broken.png" in named[0] or "nowhere.png" in named[0] or "sample 40" in named[0]


def drop_key(file: Path, i: int, key: str) -> None:
    samples = json.loads(file.read_text())
    samples[i].pop(key, None)
    write_data(file, samples)


def test_too_many_broken_samples_stop_the_run_with_one_line(assets: Assets, tmp_path: Path) -> None:
    here = with_broken(assets, tmp_path / "data", 100, {i: {"image": "nowhere.png"} for i in (10, 50, 90)})
    asked = recipe(here, tmp_path / "run", epochs=1, max_steps=0, global_batch_size=20, micro_batch_size=10)
    with pytest.raises(DataError, match=r"^2 of \d+ samples are broken, more than 1%") as raised:
        train(asked, device="cpu")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "model").exists()
    advised = shlex.split(str(raised.value).partition("run: llava ")[2])
    checked = command.run(*advised, "--json")
    assert (checked.returncode, json.loads(checked.stdout)["problems"]["missing_picture"]) == (1, 3)
    file = tmp_path / "recipe.toml"
    values = {key: value for key, value in training.to_dict(asked).items() if value not in (None, ())}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    done = command.run("train", file, "--device", "cpu", "--set", f"output_dir={tmp_path / 'other'}")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip() and "skipped" not in line]
    assert len([line for line in lines if "are broken, more than 1%" in line]) == 1
    assert "Traceback" not in done.stderr
    assert "nowhere.png" in done.stderr
    assert len(lines) == 1, done.stderr


def test_a_tolerated_share_of_broken_samples_does_not_stop_the_run(assets: Assets, tmp_path: Path) -> None:
    here = with_broken(assets, tmp_path / "data", 20, {i: {"image": "nowhere.png"} for i in (2, 10, 16)})
    asked = recipe(
        here, tmp_path / "run", epochs=1, max_steps=0, global_batch_size=10, micro_batch_size=5, max_skipped=0.2
    )
    train(asked, device="cpu")
    assert rows(tmp_path / "run")[-1]["skipped"] == 3
    assert rows(tmp_path / "run")[-1]["samples"] == 17


# ------------------------------------------------------------------------------------------------ lossy pictures


@pytest.fixture
def logos(assets: Assets, tmp_path: Path) -> Assets:
    """The shared data, in which two of the six pictures are black on transparent black."""
    images = Path(shutil.copytree(assets.images, tmp_path / "logos"))
    for name in ("1.png", "4.png"):
        Image.new("RGBA", (30, 30)).save(images / name)
    return replace(assets, images=images)


def test_lossy_pictures_are_counted_and_only_the_first_is_named(
    logos: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(logos, tmp_path / "run", epochs=1, max_steps=0, global_batch_size=34, micro_batch_size=17)
    train(asked, device="cpu")
    n = sum(sample.get("image") in ("1.png", "4.png") for sample in json.loads(logos.data.read_text()))
    assert rows(tmp_path / "run")[-1]["lossy_pictures"] == n > 2
    messages = [record.message for record in caplog.records if record.name.startswith("llava.")]
    (first,) = (message for message in messages if "of its pixels are transparent" in message)
    assert re.match(rf"{logos.data}, sample \d+ \(id s\d+\): picture: 100% of its pixels are transparent", first)
    assert f"pictures that lost values or transparency: {n}; to list them, run: llava data check" in messages[-1]


def test_the_recipe_places_transparent_pictures_on_a_background(logos: Assets, tmp_path: Path) -> None:
    inputs = {}
    for transparency in ("drop", "white", "black"):
        asked = recipe(logos, tmp_path / "run", transparency=transparency)
        dataset = BatchDataset.open(asked, start(asked, tmp_path / "tokenizer"))
        i = next(i for i in range(34) if dataset.samples[i].images == ("1.png",))
        inputs[transparency] = dataset.prepare(i)
        assert len(dataset.build([i]).losses) == (transparency == "drop")
    centre = {name: input.pixels[0, :, 28, 28] for name, input in inputs.items()}
    mean, std = torch.tensor(tiny.MEAN), torch.tensor(tiny.STD)
    assert torch.equal(centre["drop"], centre["black"])
    torch.testing.assert_close(centre["white"], (1 - mean) / std)
    torch.testing.assert_close(centre["black"], -mean / std)


def test_an_unknown_transparency_is_refused_by_the_recipe(assets: Assets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transparency is 'pink'; expected one of 'drop', 'white', 'black'"):
        recipe(assets, tmp_path / "run", transparency="pink")


# ------------------------------------------------------------------------- samples longer than the model's context

CONTEXT = 260  # tokens
LONG = {
    "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a b c d e " * 60}],
}


@pytest.fixture(scope="module")
def short_context(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """A model with a context of 260 tokens, and ten samples; the third and the last are longer than that."""
    folder = tmp_path_factory.mktemp("short")
    model = tiny.write_llava(folder / "model", clip=assets.clip, max_position_embeddings=CONTEXT)
    here = with_broken(assets, folder / "data", 10, {2: LONG, 9: LONG})
    drop_key(here.data, 2, "image")
    return Assets(assets.llama, assets.clip, model, here.data, assets.images)


@pytest.mark.parametrize("max_length", [240, 4096])
def test_a_sample_longer_than_the_context_is_skipped_counted_and_named_but_does_not_stop_the_run(
    short_context: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture, max_length: int
) -> None:
    one_epoch = {"epochs": 1, "max_steps": 0, "global_batch_size": 5, "micro_batch_size": 5, "max_length": max_length}
    train(recipe(short_context, tmp_path / "run", **one_epoch), device="cpu")
    last = rows(tmp_path / "run")[-1]
    assert (last["samples"], last["skipped"], last["too_long"]) == (8, 2, 2)
    messages = sorted(record.message for record in caplog.records if record.name == "llava.train.skipped")
    assert messages[0] == "samples not used: 2 of 10 (2 longer than the model's context, 0 broken)"
    for message, i in zip(messages[1:], (2, 9), strict=True):
        assert message.startswith(f"skipped: {short_context.data}, sample {i} (id s{i}): ")
        assert f"exceeds the model's context of {CONTEXT}" in message
    assert (tmp_path / "run" / "model").is_dir()


def test_the_check_reports_exactly_the_samples_that_training_skips(short_context: Assets, tmp_path: Path) -> None:
    _, dataset = net_and_dataset(recipe(short_context, tmp_path / "run", max_length=4096))
    measure = open_measure(None, str(short_context.llava), template=None, limit=4096, picture_tokens=None)
    report = check(short_context.data, short_context.images, measure=measure, workers=0)
    assert report.tokens is not None
    assert report.tokens.limit == CONTEXT
    found = {finding.sample: finding.text for finding in report.findings if finding.kind == "too_long"}
    assert set(found) == {2, 9}
    assert all(text.endswith("the model's context is 260, so training skips the sample") for text in found.values())
    for i in range(10):
        assert dataset.build([i]).n_too_long == (i in found)
    assert make_plan(recipe(short_context, tmp_path / "run")).too_long == 2


def test_a_sample_between_max_length_and_the_context_is_truncated_as_in_the_original(
    short_context: Assets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole = net_and_dataset(recipe(short_context, tmp_path / "a", max_length=CONTEXT))
    n = len(whole.prepare(0).ids)
    _, cut = net_and_dataset(recipe(short_context, tmp_path / "b", max_length=n - 1))
    assert torch.equal(cut.prepare(0).ids, whole.prepare(0).ids[:-1])
    assert (cut.build([0]).skipped, cut.build([0]).n_truncated, whole.build([0]).n_truncated) == ([], 1, 0)
    train(recipe(short_context, tmp_path / "c", epochs=1, max_steps=0, max_length=200), device="cpu")
    lengths = [len(whole.prepare(i).ids) for i in range(10) if i not in (2, 9)]
    n_cut = sum(n > 200 for n in lengths)
    assert rows(tmp_path / "c")[-1]["truncated"] == n_cut > 0
    assert f"samples truncated to max_length (200 tokens): {n_cut}" in caplog.text


def test_ranks_count_the_same_samples_as_a_single_process(short_context: Assets, tmp_path: Path) -> None:
    values = {"epochs": 2, "max_steps": 0, "global_batch_size": 4, "micro_batch_size": 2, "max_length": 4096}
    train(recipe(short_context, tmp_path / "one", **values), device="cpu")
    training.run_in_background(recipe(short_context, tmp_path / "two", **values), ranks=2)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    keys = ("step", "samples", "skipped", "too_long", "tokens", "target_tokens")
    assert [[row[key] for key in keys] for row in one] == [[row[key] for key in keys] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-5)
    assert two[-1]["too_long"] == 4


def test_a_run_stops_if_no_sample_fits_in_the_context(short_context: Assets, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.json", [{"id": f"s{i}", **LONG} for i in range(4)])
    here = Assets(short_context.llama, short_context.clip, short_context.llava, data, short_context.images)
    asked = recipe(here, tmp_path / "run", global_batch_size=2, micro_batch_size=2)
    with pytest.raises(
        DataError, match=r"all 4 samples so far are skipped, 4 of them .* longer than the model's context"
    ):
        train(asked, device="cpu")


@pytest.mark.parametrize("kind", ["too long", "broken"])
def test_a_short_run_that_used_no_sample_saves_no_model(short_context: Assets, tmp_path: Path, kind: str) -> None:
    """Its steps are over before enough samples have been seen to stop the run."""
    change = LONG if kind == "too long" else {"image": "nowhere.png", "conversations": GOOD}
    data = write_data(tmp_path / "data.json", [{"id": f"s{i}", **change} for i in range(50)])
    here = replace(short_context, data=data)
    asked = recipe(here, tmp_path / "run", max_steps=2, global_batch_size=2, micro_batch_size=2, max_skipped=1.0)
    for _ in range(2):  # the run itself, and the same command again
        with pytest.raises(DataError, match=r"^all 4 samples so far are skipped, [40] of them"):
            train(asked, device="cpu")
        assert not (tmp_path / "run" / "model").exists()


GOOD = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def test_the_advised_check_is_of_the_files_with_broken_samples(assets: Assets, tmp_path: Path) -> None:
    bad = [
        write_data(tmp_path / f"bad {i}.json", [{"id": "x", "image": "no.png", "conversations": GOOD}]) for i in "ab"
    ]
    data = [str(file) for file in (assets.data, *bad)]
    with pytest.raises(DataError, match="are broken, more than 1%") as raised:
        train(recipe(assets, tmp_path / "run", data=data, global_batch_size=36, micro_batch_size=36), device="cpu")
    commands = [shlex.split(one)[3:] for one in str(raised.value).partition("run: ")[2].split("; ")]
    assert sorted(words[0] for words in commands) == sorted(map(str, bad))
    for words in commands:
        checked = command.run("data", "check", *words, "--json")
        assert json.loads(checked.stdout)["problems"] == {"missing_picture": 1}, checked.stderr


@pytest.mark.parametrize("kind", ["on a base", "from parts"])
def test_the_advised_check_counts_the_tokens_of_the_run(assets: Assets, tmp_path: Path, kind: str) -> None:
    """A projector needs its base, and a language model does not say how many tokens an image has."""
    changes = training.from_parts(assets)
    if kind == "on a base":
        projector = tiny.write_projector(tmp_path / "projector", clip=assets.clip)
        changes = {"model": str(projector), "base": str(assets.llama), "train": ["projector"]}
    data = write_data(tmp_path / "data.json", [{"id": "x", "image": "0.png", "conversations": GOOD}])
    asked = recipe(replace(assets, data=data), tmp_path / "run", **changes, max_length=30, max_steps=1)
    with pytest.raises(DataError, match=r"samples are broken") as raised:
        train(asked, device="cpu")
    checked = command.run(*shlex.split(str(raised.value).partition("run: llava ")[2]), "--json")
    _, dataset = net_and_dataset(replace(asked, max_length=4096))
    assert json.loads(checked.stdout)["tokens"]["total"] == len(dataset.prepare(0).ids), checked.stderr


def test_a_recipe_without_the_location_of_its_pictures_is_refused_before_the_weights_are_read(
    assets: Assets, tmp_path: Path
) -> None:
    asked = replace(recipe(assets, tmp_path / "run"), images=None)
    for call in (make_plan, partial(train, device="cpu")):
        with pytest.raises(ConfigError, match=r"^22 of 34 samples have a picture, .*; set images=…"):
            call(asked)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    text = [{"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    make_plan(replace(asked, data=(str(write_data(tmp_path / "text.json", text)),)))


# ----------------------------------------------------------------------------------- samples that are not understood


def test_training_skips_and_names_what_the_check_reports(assets: Assets, tmp_path: Path) -> None:
    values = [{"id": name} | value for name, (value, _) in UNSUPPORTED.items()]
    good: Any = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "What is it?"}]}
    data = write_data(tmp_path / "data.json", [*values, good])
    here = Assets(assets.llama, assets.clip, assets.llava, data, assets.images)
    _, dataset = net_and_dataset(recipe(here, tmp_path / "run"))
    batch = dataset.build(range(len(values) + 1))
    assert (batch.n_samples, batch.n_too_long) == (1, 0)
    for i, (message, (name, (_, named))) in enumerate(zip(batch.skipped, UNSUPPORTED.items(), strict=True)):
        assert message.startswith(f"{data}, sample {i} (id {name})")
        assert named in message


def test_a_system_message_replaces_that_of_the_template(assets: Assets, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A pier."}]
    data = write_data(
        tmp_path / "data.json", [{"conversations": turns, "system": "Be brief."}, {"conversations": turns}]
    )
    here = Assets(assets.llama, assets.clip, assets.llava, data, assets.images)
    _, dataset = net_and_dataset(recipe(here, tmp_path / "run"))
    own, default = (dataset.prepare(i) for i in range(2))
    assert own.prompt == "Be brief. USER: What is it? ASSISTANT: A pier.</s>"
    assert default.prompt.startswith("A chat between a curious user")
    assert own.labels[own.labels != IGNORE].tolist() == default.labels[default.labels != IGNORE].tolist()
