"""The files in deploy/ are well-formed, and fit the command and its metrics. No image is built, no service started."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from prometheus_client.parser import text_string_to_metric_families

import llava
from llava.cli.app import app
from llava.serve.metrics import Metrics
from tests.conftest import PROJECT

DEPLOY = PROJECT / "deploy"
DOCKERFILE, COMPOSE, UNIT = DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", DEPLOY / "llava.service"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def parsed(file: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="no parser for YAML is installed: pip install pyyaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", "")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last(instruction: str) -> str:
    return [rest for name, rest in instructions() if name == instruction][-1]


def setting(name: str) -> str:
    """The value of a setting of the systemd unit that is given once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    return value


def served_options() -> set[str]:
    serve = typer.main.get_command(app).commands["serve"]
    return {name for one in serve.params for name in (*one.opts, *one.secondary_opts)}


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Names of all samples that /metrics can have."""
    found = Metrics()
    found.attach(llava.load().engine)
    found.output(1.0, 0.0, None, 1)
    found.response("/health", 200)
    families = text_string_to_metric_families(found.text().decode())
    return {sample.name for family in families for sample in family.samples} | {"llava_request_success_total"}


@pytest.mark.parametrize("file", ["compose.yaml", "prometheus.yml"])
def test_yaml_is_well_formed(file: str) -> None:
    assert isinstance(parsed(DEPLOY / file), dict)


@pytest.mark.parametrize(
    "command",
    [
        json.loads(last("ENTRYPOINT")) + json.loads(last("CMD")),
        shlex.split(setting("ExecStart")),
        shlex.split(COMPOSE.read_text(encoding="utf-8").split("    command: ")[1].splitlines()[0]),
    ],
    ids=["Dockerfile", "systemd", "compose"],
)
def test_the_options_of_the_command_exist(command: list[str]) -> None:
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", " ".join(command)))
    assert options
    assert options <= served_options()


def test_the_image_runs_as_a_user_without_privileges() -> None:
    user = last("USER").partition(":")[0]
    assert user not in ("root", "0")
    assert f"useradd --uid {user} " in last("RUN")
    after = [name for name, _ in instructions()]
    assert "RUN" not in after[len(after) - after[::-1].index("USER") :]


def test_the_image_checks_its_health_and_needs_a_key() -> None:
    entry = json.loads(last("ENTRYPOINT"))
    port, host = entry[entry.index("--port") + 1], entry[entry.index("--host") + 1]
    assert host == "0.0.0.0"
    assert f"http://127.0.0.1:{port}/health" in last("HEALTHCHECK")
    assert entry[entry.index("--api-key-file") + 1].startswith("/run/secrets/")


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1] if "/" not in word]
    copied = [word for word in copied if not word.startswith("--")]
    assert "pyproject.toml" in copied
    for word in copied:
        assert (PROJECT / word).exists(), word
        assert f"!{word}" in ignored, word


def test_the_files_that_compose_mounts_exist() -> None:
    services = parsed(COMPOSE)["services"]
    mounted = [volume.split(":")[0] for one in services.values() for volume in one.get("volumes", ())]
    files = [name for name in mounted if name.startswith("./") and name != "./models"]
    assert files
    for name in files:
        assert (DEPLOY / name).is_file(), name


def test_compose_connects_prometheus_to_the_server() -> None:
    compose, (job,) = parsed(COMPOSE), parsed(DEPLOY / "prometheus.yml")["scrape_configs"]
    (target,) = (target for one in job["static_configs"] for target in one["targets"])
    service, port = target.split(":")
    entry = json.loads(last("ENTRYPOINT"))
    assert service in compose["services"]
    assert port == entry[entry.index("--port") + 1]
    assert Path(job["authorization"]["credentials_file"]).name in compose["services"]["prometheus"]["secrets"]
    assert Path(entry[entry.index("--api-key-file") + 1]).name in compose["services"][service]["secrets"]


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for one in parsed(COMPOSE)["services"].values() for port in one["ports"]]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_metrics_of_the_dashboard_exist(expression: str, metrics: set[str]) -> None:
    names = set(re.findall(r"\bllava_\w+", expression))
    assert names
    assert names <= metrics


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_brackets_of_a_query_match(expression: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)


def test_the_dashboard_asks_the_data_source_that_is_selected() -> None:
    (variable,) = (one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource")
    sources = [one["datasource"] for panel in DASHBOARD["panels"] for one in (panel, *panel["targets"])]
    assert variable["query"] == "prometheus"
    assert all(source == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for source in sources)


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))


@pytest.mark.parametrize(
    ("name", "value"),
    [("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("DynamicUser", "yes"), ("PrivateTmp", "yes")],
)
def test_the_unit_is_hardened(name: str, value: str) -> None:
    assert setting(name) == value


def test_the_unit_gets_its_keys_as_a_credential() -> None:
    credential = setting("LoadCredential").partition(":")[0]
    assert f"--api-key-file %d/{credential} " in setting("ExecStart")


@pytest.mark.parametrize("arguments", [["verify"], ["security", "--offline=true", "--threshold=20"]])
def test_systemd_accepts_the_unit(arguments: list[str], tmp_path: Path) -> None:
    """security: an exposure of at most 2.0 of 10."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = setting("ExecStart").partition(" ")[0]
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(command, "/bin/true"), encoding="utf-8")  # it must exist
    argv = ["systemd-analyze", *arguments, str(unit)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert UNIT.name not in run.stderr, run.stderr  # warnings about the unit
