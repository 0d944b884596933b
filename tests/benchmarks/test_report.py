"""Limits, aims and the page that shows them, with figures whose right values are known."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.conftest import PROJECT

pytest.importorskip("transformers")
WEIGHTS, TOKEN = 13.21e9, 0.524288e6  # bytes of LLaVA-1.5-7B's weights, and of one token's keys and values


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of benchmarks/, which import each other by their own names."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("gpu_setup", "gpu_aims", "report")})


def card(scripts: SimpleNamespace, name: str, *, bandwidth: float = 4.35, product: float = 680) -> Any:
    """bandwidth in TB/s, product in TFLOP/s."""
    return scripts.gpu_aims.Card(name=name, bandwidth=bandwidth * 1e12, product=product * 1e12)


def measured(
    scripts: SimpleNamespace, case: str, value: float, unit: str, contestant: str = "llava", **work: Any
) -> Any:
    work = scripts.gpu_setup.Work(**work) if work else None
    return scripts.gpu_setup.Measured(case=case, contestant=contestant, values=[value], unit=unit, work=work)


def decode(scripts: SimpleNamespace, case: str, value: float, rows: int = 1, cached: int = 704) -> Any:
    return measured(
        scripts, case, value, "tok/s", n_bytes=WEIGHTS + rows * cached * TOKEN, flops=rows * 13.5e9, amount=rows
    )


def only_row(scripts: SimpleNamespace, found: list[Any], of: Any) -> dict[str, Any]:
    (row,) = scripts.gpu_aims.rows(found, [], of)
    return row


def test_the_limit_of_decoding_is_the_bandwidth(scripts: SimpleNamespace) -> None:
    row = only_row(scripts, [decode(scripts, "decode-1", 295)], card(scripts, "NVIDIA H200"))
    assert row["limit"] == pytest.approx(320.3, abs=0.1)
    assert row["share"] == pytest.approx(0.921, abs=0.001)
    assert (row["required"], row["stretch"]) == (290, 300)
    assert (row["reached"], row["stretch_reached"]) == (True, False)


def test_the_limit_of_many_rows_is_the_product(scripts: SimpleNamespace) -> None:
    row = only_row(scripts, [decode(scripts, "decode-128", 30_000, 128, 1)], card(scripts, "NVIDIA H200", product=100))
    assert row["limit"] == pytest.approx(100e12 / 13.5e9)


def test_prompts_and_steps_of_many_requests_follow_each_other(scripts: SimpleNamespace) -> None:
    found = measured(
        scripts, "requests-128", 31, "requests/s", n_bytes=127 * 60.2e9, flops=128 * 9e12, amount=128, in_turn=True
    )
    row = only_row(scripts, [found], card(scripts, "NVIDIA H200"))
    assert row["limit"] == pytest.approx(128 / (128 * 9 / 680 + 127 * 0.0602 / 4.35))
    assert row["required"] == 31


@pytest.mark.parametrize(
    ("case", "value", "unit", "required"),
    [
        ("decode-1", 203.0, "tok/s", 290 * 3.0 / 4.35),  # scales with the bandwidth
        ("first-token", 17.0, "ms", 19 * 680 / 790),  # with the product, and less time is better
        ("clip-64", 1500.0, "images/s", 1400 * 790 / 680),
        ("first-token-jpeg", 50.0, "ms", 60),  # holds as it stands
        ("prefix", 5.0, "times", 4),
    ],
)
def test_figures_scale_with_the_card(
    scripts: SimpleNamespace, case: str, value: float, unit: str, required: float
) -> None:
    of = card(scripts, "NVIDIA H100 80GB HBM3", bandwidth=3.0, product=790)
    row = only_row(scripts, [measured(scripts, case, value, unit)], of)
    assert row["required"] == pytest.approx(required)
    assert row["reached"] is ((value <= required) if unit == "ms" else (value >= required))


@pytest.mark.parametrize(("name", "required"), [("NVIDIA H200", 242), ("NVIDIA H100", 0.85 * 3e12 / 15.31e9)])
def test_decoding_with_4000_cached_is_a_share_of_the_limit_elsewhere(
    scripts: SimpleNamespace, name: str, required: float
) -> None:
    found = decode(scripts, "decode-4000", 240, cached=4000)
    row = only_row(scripts, [found], card(scripts, name, bandwidth=3.0))
    assert row["required"] == pytest.approx(required, rel=1e-3)


@pytest.mark.parametrize(("ours", "peer", "reached"), [(8, 12, True), (8, 7, False), (11, 12, False), (8, None, True)])
def test_the_start_must_also_be_faster_than_the_peers(
    scripts: SimpleNamespace, ours: float, peer: float | None, reached: bool
) -> None:
    found = [measured(scripts, "start", ours, "s")]
    found += [measured(scripts, "start", peer, "s", "transformers")] if peer else []
    assert only_row(scripts, found, card(scripts, "NVIDIA H200"))["reached"] is reached


def test_mpt_is_compared_with_llamas_share_of_the_bandwidth(scripts: SimpleNamespace) -> None:
    llama = measured(scripts, "decode-1", 300, "tok/s", n_bytes=13e9)
    mpt = measured(scripts, "mpt", 290, "tok/s", n_bytes=13.2e9)
    rows = scripts.gpu_aims.rows([llama, mpt], [], card(scripts, "NVIDIA H200"))
    (share,) = [row for row in rows if row["case"] == "mpt-share"]
    assert share["value"] == pytest.approx(290 * 13.2 / (300 * 13))
    assert share["reached"] is True


def test_the_page_shows_every_row_and_every_failure(scripts: SimpleNamespace, tmp_path: Path) -> None:
    found = [
        decode(scripts, "decode-1", 295),
        measured(scripts, "decode-1", 45, "tok/s", "transformers"),
        measured(scripts, "decode-1", 203, "tok/s", "gpt-fast"),
        decode(scripts, "decode-128", 6000, 128),
        measured(scripts, "clip-64", 1300, "images/s", n_bytes=6e8, flops=64 * 0.37e12, amount=64),
        measured(scripts, "first-token", 17, "ms", n_bytes=WEIGHTS, flops=9e12),
    ]
    failure = scripts.gpu_aims.Failure(case="prefix", contestant="llava", reason="out of memory", skipped=False)
    of = card(scripts, "NVIDIA H200")
    result = tmp_path / "result.json"
    result.write_text(
        json.dumps(
            {
                "date": "2026-11-28",
                "commit": "0123456789ab",
                "versions": {"torch": "2.11.0"},
                "card": {"name": of.name, "bandwidth": of.bandwidth, "product": of.product},
                "rows": scripts.gpu_aims.rows(found, [failure], of),
                "measured": [one.to_dict() for one in found],
            }
        )
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- result: begin -->\nold\n<!-- result: end -->\nafter\n")
    for _ in range(2):  # the second run replaces what the first wrote
        scripts.report.main(result, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- result: begin -->\n2026-11-28, NVIDIA H200 (measured 4.35 TB/s")
    assert text.endswith("<!-- result: end -->\nafter\n")
    assert "old" not in text
    assert (
        "| decode, batch 1 | 295 tok/s | 45 tok/s | 203 tok/s | 320 tok/s | 92% | 290 tok/s | 300 tok/s | yes |" in text
    )
    assert (
        "| CLIP, batch 64 | 1,300 images/s |  |  | 1,838 images/s | 71% | 1,400 images/s | 1,600 images/s | **no** |"
        in text
    )
    assert "- 512 questions, one picture, llava: failed, out of memory" in text
    with Image.open(tmp_path / "page.png") as plot:
        assert plot.format == "PNG"
        assert len(plot.convert("RGB").getcolors(2**24)) > 100
