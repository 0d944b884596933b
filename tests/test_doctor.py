"""`llava doctor` reports what is here, and reports faults of what it examines instead of failing."""

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from llava import doctor, kernels
from llava.doctor import DISTRIBUTION, examine, measure, to_dict
from llava.kernels.support import is_interpreted, triton
from tests.command import LLAVA, run_well

GPU = torch.cuda.is_available()


def report(*args: object, command: Any = None, **variables: object) -> Any:
    """The report of `llava doctor` with changed environment variables; parsed with --json."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    out = run_well("doctor", *args, env=environment, command=command).stdout
    return json.loads(out) if "--json" in args else out


def test_the_report_names_versions_devices_kernels_extras_and_caches():
    found = report("--json")
    assert list(found) == ["versions", "devices", "kernels", "extras", "caches"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["cores"] >= 1
    assert 0 < found["devices"]["memory"]["free"] <= found["devices"]["memory"]["total"]
    assert {"triton kernels", "cuda graphs", "dependent launch", "varlen attention"} <= set(found["kernels"])
    assert {"hub", "triton", "inductor"} == set(found["caches"])


def test_text_and_json_have_the_same_lines_and_the_text_fits_80_columns():
    text, found = report(COLUMNS=80), report("--json")
    assert all(len(line) <= 80 for line in text.splitlines())
    for section, lines in found.items():
        assert f"{section}:" in text.splitlines()
        assert all(re.search(rf"^{re.escape(name)} ", text, re.MULTILINE) for name in lines)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_the_report_says_why_kernels_do_not_run():
    found = report("--json")
    assert found["devices"]["gpu"].startswith("none: ")
    assert found["kernels"]["triton kernels"] == {
        "run": False,
        "why_not": "the device is cpu, not cuda" if triton else "Triton is not installed, or cannot be imported",
    }
    assert found["kernels"]["cuda graphs"] is False


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: pytest -m gpu")
def test_a_gpu_is_reported_with_its_memory():
    found = report("--json", command=LLAVA)
    one = found["devices"]["cuda:0"]
    assert one["name"] == torch.cuda.get_device_name(0)
    assert 0 < one["free"] <= one["total"]
    assert found["kernels"]["cuda graphs"] is True
    assert re.fullmatch(r"\d+(\.\d+)+", found["versions"]["driver"])


@pytest.mark.skipif(triton is None, reason="needs Triton: pip install triton -c constraints.txt")
def test_the_interpreter_is_named():
    assert "in Triton's interpreter, for tests" in report(command=LLAVA, TRITON_INTERPRET=1)


@pytest.mark.parametrize(
    ("package", "section"), [("triton", "kernels"), ("torch", "kernels"), ("torch", "devices"), ("torch", "versions")]
)
def test_a_library_that_cannot_be_imported_is_a_line(package: str, section: str, tmp_path: Path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libcuda.so: cannot open')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = report("--json", command=LLAVA, PYTHONPATH=path)
    assert {"error": "OSError: libcuda.so: cannot open"} in found[section].values()
    assert found["versions"]["python"]
    assert found["caches"]["hub"]["folder"]


def test_a_probe_that_raises_midway_keeps_its_first_findings(monkeypatch: pytest.MonkeyPatch):
    def broken():
        yield doctor.Finding("first", "is fine")
        raise RuntimeError("the second is not")

    monkeypatch.setattr(doctor, "_extras", broken)
    assert to_dict(examine({}, {}))["extras"] == {
        "first": "is fine",
        "extras": {"error": "RuntimeError: the second is not"},
    }


@pytest.mark.skipif(GPU or is_interpreted(), reason="kernels run here")
def test_kernels_are_found_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kernel = "from llava.kernels.support import jit\n@jit\ndef double_kernel(x_ptr): pass\n"
    for name, code in {
        "doubled_for_test": f'"""Doubles a vector.\n\nSlowly."""\n{kernel}',
        "choosy_for_test": f'"""Needs more."""\n{kernel}def why_not(device): return f"{{device}} is too small"\n',
        "broken_for_test": "import no_such_module",
        "plain_for_test": '"""Has parts of kernels only."""\nfrom llava.kernels.support import jit\n',
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    found = to_dict(examine({}, {}))["kernels"]
    assert found["doubled_for_test"]["does"] == "Doubles a vector."
    assert found["doubled_for_test"]["why_not"] == found["triton kernels"]["why_not"]
    assert found["choosy_for_test"] == {"run": False, "why_not": "cpu is too small", "does": "Needs more."}
    assert found["broken_for_test"] == {"error": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert not {"plain_for_test", "support"} & set(found)


def test_extras_are_those_of_the_package_and_name_what_is_missing():
    found = to_dict(examine({}, {}))["extras"]
    assert set(found) == set(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra"))
    for extra, one in found.items():
        assert one["installed"] == all(one["versions"].values())
        assert one["command"] == f"pip install '{DISTRIBUTION}[{extra}]'"
    assert found["test"]["versions"]["pytest"] == pytest.__version__


def test_a_cache_that_others_can_write_is_reported(tmp_path: Path):
    folder = tmp_path / "llava" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    variables = {"XDG_CACHE_HOME": tmp_path, "TRITON_CACHE_DIR": tmp_path, "TORCHINDUCTOR_CACHE_DIR": ""}
    found = report("--json", **variables)["caches"]
    assert found["inductor"]["problem"] == f"{folder} is writable by other users (mode 777)"
    assert found["triton"] == {"folder": str(tmp_path), "bytes": 0, "files": 0, "complete": True, "problem": None}


def test_a_folder_is_measured_without_following_links(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "data").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "more").write_bytes(b"x" * 24)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert measure(tmp_path) == (1024, 2, True)
    assert measure(tmp_path / "none") == (0, 0, True)
    assert measure(tmp_path, timeout_s=0)[2] is False
