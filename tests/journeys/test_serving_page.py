"""What docs/serving.md and the README say about `llava serve`: the examples run, and the tables are complete."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import typer.main
from prometheus_client.parser import text_string_to_metric_families

from llava.cli.app import app
from llava.serve.limits import Limits
from llava.serve.schema import ChatRequest, CompletionRequest, ExplainRequest
from tests.command import TIMEOUT_S, run_well, start, wait_for_output
from tests.conftest import PROJECT

PAGE = PROJECT / "docs" / "serving.md"
README = PROJECT / "README.md"
ADDRESS = "http://127.0.0.1:8000"  # of the server on the pages
UNITS = {"s": 1, "MiB": 2**20, "KiB": 2**10, "": 1}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the server."""
    return tmp_path_factory.mktemp("log") / "llava.log"


@pytest.fixture(scope="module")
def serving(log: Path) -> Iterator[str]:
    """The line that `llava serve` prints when it is ready."""
    process = start("serve", "--port", "0", "--log-file", log, cwd=PROJECT)
    yield wait_for_output(process, "\n").strip()
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def address(serving: str) -> str:
    return serving.split()[-1]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_complete(command: str) -> bool:
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False)
    return parsed.returncode == 0 and not command.endswith("\\")


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Each command of the page, and the output that the page shows."""
    for block in blocks(page, "console"):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = text.splitlines()
            n = next(n for n in range(1, len(lines) + 1) if is_complete("\n".join(lines[:n])))
            yield "\n".join(lines[:n]), "\n".join(lines[n:])


def commands_with(words: str) -> list[tuple[str, str]]:
    return [(command, output) for page in (README, PAGE) for command, output in commands(page) if words in command]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the page, as cells, without the head."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert lines
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def unquoted(cells: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", cells))


def steady(output: str) -> str:
    """An output without what differs from call to call."""
    return re.sub(r'("id": ?"\w+-|"created": ?|"cached_tokens": ?| of (?=.* free))[\w.]+', r"\1…", output.strip())


def test_the_server_prints_the_line_on_the_pages(serving: str, address: str) -> None:
    shown = [output for command, output in commands_with("llava serve") if command == "llava serve"]
    assert shown == [serving.replace(address, ADDRESS)] * 2


@pytest.mark.parametrize(("command", "output"), commands_with("--dry-run"))
def test_the_plan_on_the_page_is_printed(command: str, output: str) -> None:
    printed = run_well(*shlex.split(command)[1:]).stdout
    assert steady(printed) == steady(output)


def options_of(command: str) -> set[str]:
    params = typer.main.get_command(app).commands[command].params
    return {name for one in params for name in (*one.opts, *one.secondary_opts) if name != "-m"}


def test_the_page_names_every_option_of_its_own_and_no_other() -> None:
    words = {word for command, _ in commands_with("llava serve") for word in shlex.split(command)}
    words |= {quoted.split()[0] for quoted in unquoted(PAGE.read_text(encoding="utf-8"))}
    named = {word for word in words if word.startswith("--")}
    assert named <= options_of("serve") | options_of("bench-serve")
    assert options_of("serve") - options_of("ask") <= named


@pytest.mark.parametrize(("command", "output"), commands_with("llava bench-serve"))
def test_the_load_test_on_the_page_runs(command: str, output: str, address: str) -> None:
    printed = run_well(*shlex.split(command.replace(ADDRESS, address))[1:]).stdout.splitlines()
    assert [line.split()[0] for line in printed] == [line.split()[0] for line in output.splitlines()]
    assert printed[1].split() == ["errors", "0"]


@pytest.mark.parametrize(("command", "output"), commands_with("curl"))
def test_curl_gets_the_answers_on_the_pages(command: str, output: str, address: str) -> None:
    argv = ["bash", "-euo", "pipefail", "-c", command.replace(ADDRESS, address)]
    run = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 0, run.stderr
    assert steady(run.stdout) == steady(output)


def test_the_openai_package_gets_the_answers_on_the_page(address: str) -> None:
    code = "\n".join(blocks(PAGE, "python"))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    argv = [sys.executable, "-c", code.replace(ADDRESS, address)]
    run = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 0, run.stderr
    printed = run.stdout.splitlines()
    assert [line for line in printed if line in expected] == expected


@pytest.mark.parametrize(("column", "request_type"), [(1, ChatRequest), (2, CompletionRequest)])
def test_the_table_of_parameters_is_complete(column: int, request_type: type[ChatRequest | CompletionRequest]) -> None:
    taken = {name for row in table("Parameters") if row[column] == "yes" for name in unquoted(row[0])}
    assert taken == set(request_type.model_fields)


def test_the_table_of_parameters_of_explanations_is_complete() -> None:
    added = {name for row in table("Explain") for name in unquoted(row[0])}
    assert added == set(ExplainRequest.model_fields) - set(ChatRequest.model_fields)


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}, 200),
        ({"tools": [], "store": False, "tool_choice": "none", "best_of": None}, 200),
        ({"tools": [{"type": "function"}]}, 400),
        ({"store": True}, 400),
        ({"suffix": "B"}, 400),
    ],
)
def test_parameters_are_ignored_or_refused_as_the_page_says(more: dict[str, object], status: int, address: str) -> None:
    body = {"model": "llava-tiny", "messages": HI, "max_tokens": 1} | more
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] in more


def test_the_table_of_limits_has_the_defaults() -> None:
    shown = {}
    for name, default, *_ in table("Limits"):
        number, _, unit = default.partition(" ")
        shown[name.strip("`")] = int(number.replace(",", "")) * UNITS[unit]
    assert shown == asdict(Limits())


def test_the_table_of_errors_is_complete() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "llava/serve").rglob("*.py"))
    raised = set(re.findall(r"ApiError\(\s*(\d{3})", source)) - {"499"}  # 499 has no reader
    rows = table("Errors")
    assert {row[0] for row in rows} == raised | {"405"}  # from the framework
    codes = set(re.findall(r'code="(\w+)"', source))
    assert {code for row in rows for code in unquoted(row[2])} == codes


def test_the_table_of_metrics_is_complete(address: str) -> None:
    text = httpx.get(f"{address}/metrics").text
    families = {
        family.name + "_total" * (family.type == "counter"): family.type
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    assert {row[0].strip("`"): row[1] for row in table("Metrics")} == families


def test_the_table_of_paths_is_complete(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert set().union(*(unquoted(row[0]) for row in table("Paths"))) == served | {"GET /openapi.json", "GET /"}


def test_a_line_of_the_log_has_the_fields_on_the_page(log: Path, address: str) -> None:
    httpx.get(f"{address}/v1/models", headers={"x-request-id": "mine"})
    end = time.monotonic() + 10  # a line is written after its response
    while not (found := re.search(r'^.*"request_id": "mine".*$', log.read_text("utf-8"), re.MULTILINE)):
        assert time.monotonic() < end
        time.sleep(0.01)
    (shown,) = blocks(PAGE, "json")
    assert list(json.loads(found[0])) == list(json.loads(shown))
