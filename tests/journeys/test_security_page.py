"""The page about security: each threat in its table has a test that exists."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PROJECT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "`test_" in line
]
ASKED = (
    "SSRF", "private, link-local", "IPv6", "redirects", "rebinding", "user names", "backslashes", "bombs", "giant",
    "without an end", "Slow clients", "poisoned cache", "time to an answer", "Header injection", "Log injection", "`n`",
    "stop strings", "schemas", "key from the time", "Path traversal",
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_threat_has_a_test(row: list[str]) -> None:
    threat, done, test = row
    assert threat
    assert done
    file, name = test.strip("`").split("::")
    found = [path for path in (PROJECT / "tests").rglob(file) if re.search(rf"\bdef {name}\(", path.read_text())]
    assert found, test


def test_the_threats_that_a_server_of_models_has_are_in_the_table() -> None:
    table = " ".join(row[0] for row in ROWS)
    assert [one for one in ASKED if one not in table] == []
