"""JSON lines that survive a kill, trackers checked with their own readers, curves, and live progress."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.errors import ConfigError, DataError, LlavaError
from llava.train.log import open_logs, read_rows
from llava.train.plot import plot
from llava.train.progress import MovingAverage, TrainProgress
from tests.conftest import PROJECT

CONFIG = {"lr": 1e-3, "data": ("a.json", "b.json"), "images": None}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 100,
        "loss": 3 / step,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "samples": 8 * step,
    } | more


def write(run: Path, steps: range, names: tuple[str, ...] = (), resume_step: int = 0) -> None:
    logs = open_logs(run, names, CONFIG, resume_step)
    for step in steps:
        for log in logs:
            log.write(row(step))
    for log in logs:
        log.close()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- JSON lines


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 11), resume_step=4)
    assert steps(tmp_path) == list(range(1, 11))
    assert list(read_rows(tmp_path / "log.jsonl")) == [row(step) for step in range(1, 11)]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 5))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(row(5))[:cut])
    assert len(list(read_rows(tmp_path / "log.jsonl"))) == 4
    write(tmp_path, range(5, 8), resume_step=4)
    assert steps(tmp_path) == list(range(1, 8))


def test_a_run_from_the_start_replaces_the_previous_log(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 4))
    assert steps(tmp_path) == [1, 2, 3]


def test_rows_survive_when_the_process_is_killed(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from pathlib import Path
        from llava.train.log import open_logs
        logs, step = open_logs(Path(sys.argv[1]), (), {}, int(sys.argv[2])), int(sys.argv[2])
        while True:
            step += 1
            logs[0].write({"step": step, "loss": 1.0})
            print(step, flush=True)"""
    resume_step = 0
    for _ in range(3):
        argv = [sys.executable, "-c", script, str(tmp_path), str(resume_step)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
        assert process.stdout is not None
        printed = [int(process.stdout.readline()) for _ in range(50)][-1]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        written = [found["step"] for found in read_rows(tmp_path / "log.jsonl")]
        assert written == list(range(1, written[-1] + 1))
        assert written[-1] >= printed
        resume_step = printed - 10  # the last checkpoint is older than the last row


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"loss": 2.0}\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"log\.jsonl: line 2 is not"):
        open_logs(tmp_path, (), CONFIG, 3)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    logs = open_logs(tmp_path, (), CONFIG, 0)
    logs[0].write(row(1, loss=float("nan"), grad_norm=float("inf")))
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["loss"] is None


def test_an_unknown_tracker_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'mlflow'; expected any of tensorboard, wandb, trackio"):
        open_logs(tmp_path / "run", ("mlflow",), CONFIG, 0)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlavaError, match=r"file/run: cannot be written \(Not a directory\)"):
        open_logs(tmp_path / "file" / "run", (), CONFIG, 0)


# --------------------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_names_the_extra(tmp_path: Path, hide: Any, name: str) -> None:
    write(tmp_path, range(1, 4))
    hide(name)
    with pytest.raises(ConfigError, match=rf"{name} cannot be imported.*pip install 'llava-native\[train\]'"):
        open_logs(tmp_path, (name,), CONFIG, 0)
    assert steps(tmp_path) == [1, 2, 3]


def test_without_trackers_none_is_imported() -> None:
    script = "import sys, llava.train.log, llava.train.plot, llava.train.progress\n"
    script += "print({'tensorboard', 'wandb', 'trackio', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


def test_tensorboard_reads_back_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: train)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 8), ("tensorboard",))
    time.sleep(1.1)  # event files are read in the order of their names, which have a resolution of one second
    write(tmp_path, range(5, 11), ("tensorboard",), resume_step=4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss", "lr", "grad_norm", "samples"}
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in loss] == list(range(1, 11))
    assert [value for _, value in loss] == pytest.approx([3 / step for step, _ in loss])
    assert any("recipe" in tag for tag in events.Tags()["tensors"])


def tracked(run: Path, name: str, steps: range, resume_step: int, **environment: str) -> str:
    """Calls `write` in a new process, because trackers read the environment once. Returns its stdout."""
    script = "import sys; from pathlib import Path; from tests.train.test_log import write\n"
    script += f"write(Path(sys.argv[1]), {steps!r}, ({name!r},), {resume_step})"
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_offline_continues_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra: train)")
    assert tracked(tmp_path, "wandb", range(1, 5), 0, WANDB_MODE="offline") == ""
    first = (tmp_path / "wandb.id").read_text()
    assert tracked(tmp_path, "wandb", range(4, 7), 3, WANDB_MODE="offline") == ""
    assert (tmp_path / "wandb.id").read_text() == first
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{first}.wandb"))
    assert len(files) == 2
    assert all(b"grad_norm" in file.read_bytes() for file in files)


def test_wandb_without_an_api_key_explains_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra: train)")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        open_logs(tmp_path, ("wandb",), CONFIG, 0)


def test_trackio_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (extra: train)")
    database, run = str(tmp_path / "database"), tmp_path / "run"
    assert tracked(run, "trackio", range(1, 8), 0, TRACKIO_DIR=database) == ""
    assert tracked(run, "trackio", range(5, 11), 4, TRACKIO_DIR=database) == ""
    script = """if True:
        import json, trackio
        from trackio.sqlite_storage import SQLiteStorage
        runs = list(trackio.Api().runs("llava"))
        rows = SQLiteStorage.get_logs("llava", runs[0].name, run_id=runs[0].id)
        print(json.dumps([len(runs), [[row["step"], row["loss"]] for row in rows], runs[0].config]))"""
    environment = os.environ | {"TRACKIO_DIR": database}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    n_runs, rows, config = json.loads(out.stdout)
    assert n_runs == 1
    assert rows == [[step, 3 / step] for step in range(1, 11)]
    assert config["lr"] == CONFIG["lr"]


# ----------------------------------------------------------------------------------------------------------- curves


def panels(file: Path) -> list[np.ndarray]:
    """The panels of a plot, each [400, 600, 3]."""
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.shape[1] == 1200
    return [half for band in np.split(pixels, pixels.shape[0] // 400) for half in np.split(band, 2, axis=1)]


def coloured(pixels: np.ndarray, rgb: tuple[int, int, int]) -> int:
    """The number of pixels within 30 of a colour in every channel."""
    return int((np.abs(pixels.astype(int) - rgb).max(axis=2) < 30).sum())


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two


def test_curves_of_two_runs_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    for name in ("first", "second"):
        write(tmp_path / name, range(1, 200))
    out = plot([tmp_path / "first"])
    assert out == tmp_path / "first" / "curves.png"
    loss, lr, norm, empty = panels(out)
    for panel in (loss, lr, norm):
        assert coloured(panel, BLUE) > 200
        assert coloured(panel, ORANGE) == 0
    assert (empty == 255).all()  # no tokens/s in these rows
    logs = open_logs(tmp_path / "second", (), CONFIG, 199)
    logs[0].write(row(200, loss=float("nan"), tokens_per_s=900.0))
    both = plot([tmp_path / "first", tmp_path / "second"], tmp_path / "both.png")
    assert coloured(panels(both)[0], ORANGE) > 200
    assert not (panels(both)[3] == 255).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "first", "second"]


def test_plot_without_a_log_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    with pytest.raises(DataError, match=r"log\.jsonl: cannot be read"):
        plot([tmp_path])
    open_logs(tmp_path, (), CONFIG, 0)
    with pytest.raises(DataError, match=r"log\.jsonl: contains no rows yet"):
        plot([tmp_path])


def test_plot_without_matplotlib_names_the_extra(tmp_path: Path, hide: Any) -> None:
    write(tmp_path, range(1, 4))
    hide("matplotlib")
    with pytest.raises(ConfigError, match=r"matplotlib.*pip install 'llava-native\[train\]'"):
        plot([tmp_path])


# --------------------------------------------------------------------------------------------------------- progress


def test_the_moving_average_of_a_constant_is_the_constant_and_ignores_nan() -> None:
    average = MovingAverage()
    assert [average.add(2.5) for _ in range(3)] == pytest.approx([2.5] * 3)
    assert average.add(float("nan")) == pytest.approx(2.5)
    assert 2.5 < average.add(10.0) < 10.0


def test_a_pipe_gets_rows_on_request_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        with TrainProgress(3, as_json=as_json) as progress:
            for step in range(1, 4):
                progress.update(row(step))
        out, err = capsys.readouterr()
        assert err == ""
        assert [json.loads(line)["step"] for line in out.splitlines()] == ([1, 2, 3] if as_json else [])


def in_a_terminal(script: str) -> str:
    """The stderr of a Python script in a terminal of 140 columns. Checks that its stdout is empty."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "140", "TERM": "xterm"}
    argv = [sys.executable, "-c", script]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=slave, cwd=PROJECT, env=environment)
    os.close(slave)
    seen = b""
    with open(master, "rb", buffering=0) as terminal:
        try:
            while chunk := terminal.read(4096):
                seen += chunk
        except OSError:  # the script has exited
            pass
    assert process.communicate(timeout=60)[0] == b""
    return seen.decode()


def test_a_terminal_shows_a_progress_bar() -> None:
    script = """if True:
        from llava.train.progress import TrainProgress
        with TrainProgress(20, 4) as progress:
            for step in range(5, 21):
                progress.update({"step": step, "loss": 1.25, "lr": 2e-5, "tokens_per_s": 51234.5, "mfu": 0.413,
                                 "skipped": 2})"""
    seen = in_a_terminal(script)
    for part in ("20/20", "loss 1.2500", "lr 2.00e-05", "51,234 tokens/s", "MFU 41.3%", "2 skipped"):
        assert part in seen, seen[-500:]


def test_warnings_appear_above_the_bar() -> None:
    script = """if True:
        import logging
        from llava.train.progress import TrainProgress
        logging.basicConfig(format="llava: %(message)s")
        with TrainProgress(3) as progress:
            for step in range(1, 4):
                logging.getLogger("llava.train").warning("skipped: [sample %d]", step)
                progress.update({"step": step, "loss": 1.25, "lr": 2e-5})
        logging.warning("after")"""
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_a_terminal(script))
    lines = [line.strip() for line in re.split(r"[\r\n]+", seen)]
    for text in (*(f"llava: skipped: [sample {step}]" for step in (1, 2, 3)), "llava: after"):
        assert lines.count(text) == 1, seen
