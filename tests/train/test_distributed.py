"""Training on several ranks."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import llava.train.loss
import llava.train.start
from llava.train.start import start
from tests import command, tiny, training
from tests.training import (
    LORA,
    Assets,
    begin,
    from_parts,
    losses,
    net_and_dataset,
    recipe,
    rows,
    run,
    run_in_background,
    stored,
    toml,
)

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
    copy = llava.train.start.copy_tokenizer

    def after_another(source: Path, target: Path, new_tokens: Mapping[str, int]) -> None:
        (tmp_path / "tokenizer").mkdir()  # another rank is faster
        copy(source, tmp_path / "tokenizer", new_tokens)
        copy(source, target, new_tokens)

    monkeypatch.setattr(llava.train.start, "copy_tokenizer", after_another)
    values = from_parts(assets) | {"train": ["projector", "rows"], "start_end": True}
    found = start(recipe(assets, tmp_path / "run", **values), tmp_path / "tokenizer")
    assert found.tokenizer.id_of("<im_end>") == tiny.PIECES + 2


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


def test_an_error_on_two_ranks_ends_both(assets: Assets, tmp_path: Path) -> None:
    going = begin(recipe(assets, tmp_path / "run", lr=1e30, max_grad_norm=0, warmup_ratio=0), ranks=2)
    assert going.wait() == [2, 2]
    assert "the loss is" in going.output.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_names_the_option_to_train_on_the_cpu(assets: Assets, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run", max_steps=1))
    command.assert_one_line_error(command.run("train", file, "--device", "cuda"), "no GPU was found", "--device cpu")
    command.run_well("train", file, "--device", "cpu")
