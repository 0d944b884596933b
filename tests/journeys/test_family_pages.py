"""Runs the commands of the family pages and of `llava zoo show` on small checkpoints under the published names."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llava
from llava.checkpoint.inspect import describe
from llava.checkpoint.open import open_checkpoint
from llava.cli import main
from llava.zoo import catalogue as zoo
from tests import rows, tiny
from tests.conftest import PROJECT

PAGES = sorted((PROJECT / "docs" / "families").glob("*.md"))
ROWS = {entry["id"]: entry for entry in zoo.entries()}
BASES = {id: entry for entry in zoo.entries() if (id := zoo.base_id(entry))}
META = "llama-7b-from-meta"  # the only folder on the pages without a hub id
QUESTION = "What is unusual here?"
# formats as `llava inspect` prints them, and those that commands write
KINDS = {"hf-reexport": "llava-hf", "merged": "llava"}
WRITTEN = {"native": ("native",), "llava": ("llava", "mpt"), "llava-hf": ("llava-hf",), "llama": ("llama",)}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the code blocks, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command; quotes may span several lines."""
    text = ""
    for line in block.splitlines(keepends=True):
        text += line
        try:
            words = shlex.split(text)
        except ValueError:  # a quote is open
            continue
        if words:
            yield words
        text = ""
    assert not text, f"unclosed quote: {text}"


def write_vicuna_v0(folder: Path) -> None:
    """Writes Vicuna v0 as published: a plain Llama minus LLaMA-1, with a row for [PAD]."""
    config = tiny.llama_config(vocab_size=tiny.PIECES + 1, **tiny.LLAMA_1)
    tensors = tiny.llama_tensors(config, 1, inv_freq=True)
    for name, raw in tiny.llama_tensors(tiny.llama_config(**tiny.LLAMA_1), 7, inv_freq=True).items():
        tensors[name][: len(raw)] -= raw
    tiny.write_tokenizer(folder, added=("[PAD]",), pad="[PAD]")
    tiny.write_model(folder, tensors, "bin-shards", config)


def furnish(desk: Path, code: str, clip: Path) -> None:
    """Writes everything that the code uses but does not create, under hub ids or as `hf download` would."""
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(desk / "photo.jpg")
    for name in sorted(set(re.findall(r"[\w.#/-]+", code))):
        if name in ROWS:
            rows.write_published(desk / name, ROWS[name], clip)
            if rows.bare(ROWS[name]):
                tiny.write_clip(desk / ROWS[name]["vision_tower"], dim=rows.WIDE)
        elif name.endswith("-delta-v0") and name in BASES:
            write_vicuna_v0(desk / name)
        elif name in BASES:
            rows.write_base(desk / name, BASES[name])
        elif name == META:
            tiny.write_meta(desk / name, seed=7, **tiny.LLAMA_1)  # the base of the scaled-down deltas


def download(words: list[str]) -> str:
    """Runs `hf download` with hub ids that are local folders."""
    assert words[1] == "download"
    (repo, *files), named = options(words[2:])
    if "local-dir" in named:
        folder = Path(named["local-dir"])
        for file in files:
            folder.mkdir()
            shutil.copy(f"{repo}#{file}", folder / file)
        if not files:
            shutil.copytree(repo, folder)
    return ""


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command, which must succeed, and returns its stdout."""
    if words[:3] == ["llava", "zoo", "check"]:  # entries differ in size, so this writes full-size headers
        rows.write_headers(Path("full-size", words[3]), ROWS[words[3]])
        words = [*words[:3], f"full-size/{words[3]}"]
    if words[0] == "hf":
        return download(words)
    if words[0] == "python3":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert words[0] == "llava", f"{words[0]}: this test cannot run that command"
    code: object = 0
    capsys.readouterr()
    try:
        main(words[1:])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert not code, printed.err
    return printed.out


def options(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The positional arguments of a command, and its options that take a value."""
    alone, named, rest = [], {}, iter(words)
    for word in rest:
        if not word.startswith("--"):
            alone.append(word)
        elif word not in ("--verify", "--precise"):
            named[word.removeprefix("--")] = next(rest)
    return alone, named


def same_answers(one: dict[str, Any], other: dict[str, Any], *, sees: bool = True) -> None:
    prompt = {"messages": f"<image>\n{QUESTION}", "images": ["photo.jpg"]} if sees else {"messages": QUESTION}
    both = [llava.load(**where, vision=sees).generate(**prompt, max_new_tokens=8) for where in (one, other)]
    assert both[0].text == both[1].text


class Claims:
    """Checks after each command that it did what the page says."""

    def __init__(self) -> None:
        self.kinds = {id: KINDS.get(entry["format"], entry["format"]) for id, entry in ROWS.items()}
        self.kinds |= {"liuhaotian/LLaVA-Lightning-MPT-7B-preview": "mpt", META: "meta"}

    def check(self, words: list[str], printed: str) -> None:
        if words[0] == "hf":
            return
        if words[0] == "python3":
            assert words[1:3] == ["-m", "llava.model.apply_delta"]
            job, rest = "apply_delta", words[3:]
        else:
            job, rest = words[1].replace("-", "_"), words[2:]
        getattr(self, job)(printed, *options(rest))

    def ask(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        assert printed.strip()

    def inspect(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        assert re.search(rf"^kind +{self.kinds[alone[0]]} *$", printed, re.MULTILINE), printed

    def zoo(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        if not alone:
            assert {id for id in ROWS if id in printed.split()} == {e["id"] for e in zoo.select(**named)}
        elif alone[0] == "show":
            assert f"hf download {zoo.base_id(zoo.find(alone[1]))} " in printed
        else:
            assert alone[0] == "check"
            assert f"{alone[1]} is this:\n  {alone[1]}\nevidence:\n" in printed

    def _made(self, folder: str, *kinds: str) -> None:
        self.kinds[folder] = describe(folder).kind
        assert self.kinds[folder] in kinds

    def convert(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        source, out = alone
        to = named.get("to", "native")
        assert Path(out, "conversion.md").is_file()
        self._made(out, *WRITTEN[to])
        mode = {"image_mode": "original"} if to == "llava" else {}  # the layout has no other mode
        same_answers({"path": source, "base": named.get("base"), **mode}, {"path": out}, sees=to != "llama")

    def apply_delta(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        self._merged(printed, named["target"], path=named["delta"], base=named["base"])

    def merge_lora(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        self._merged(printed, named["target"], path=named["lora"], base=named["base"])

    def _merged(self, printed: str, target: str, **parts: str) -> None:
        sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(target).glob("*.safetensors")}
        assert sums
        assert Path(target, "SHA256SUMS").read_text() == "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        assert not Path(f"{target}.partial").exists()
        self._made(target, "llava", "llama")  # Vicuna v0 is not a LLaVA
        same_answers({"path": target}, parts, sees=self.kinds[target] == "llava")

    def make_delta(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        self._made(named["delta"], "delta")
        same_answers({"path": named["target"]}, {"path": named["delta"], "base": named["base"]})

    def extract_projector(self, printed: str, alone: list[str], named: dict[str, str]) -> None:
        source, out = alone
        self._made(out, "projector")
        wanted = {
            name: value for name, value in open_checkpoint(source).read_tensors() if name.startswith("projector.")
        }
        found = torch.load(Path(out, "mm_projector.bin"), weights_only=True)
        assert len(found) == len(wanted) > 0
        for name, value in wanted.items():
            torch.testing.assert_close(found[name.replace("projector.", "model.mm_projector.")], value, rtol=0, atol=0)


LONE = "has the shape of projectors for"  # warning for a single file, which records no tower


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_command_on_a_page_does_what_the_page_says(
    page: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, "\n".join(text for _, text in blocks(page)), clip)
    claims, names = Claims(), {"__name__": "__main__"}
    assert any(language == "bash" for language, _ in blocks(page))
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for words in commands(text):
            claims.check(words, run(words, capsys))
    assert not [
        record for record in caplog.records if LONE not in record.getMessage()
    ]  # no other warning, such as that about a wrong base


@pytest.mark.parametrize("id", {entry["family"]: id for id, entry in ROWS.items()}.values())
def test_each_command_that_zoo_show_prints_runs_in_its_order(
    id: str,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for _, line in zoo.commands(ROWS[id])]
    furnish(tmp_path, "\n".join([id, *lines]), clip)
    claims = Claims()
    for line in lines:
        claims.check(shlex.split(line), run(shlex.split(line), capsys))
    assert not [record for record in caplog.records if LONE not in record.getMessage()]


def test_each_row_of_the_zoo_is_named_on_a_page() -> None:
    prose = "\n".join(
        re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE) for page in PAGES
    )
    assert not set(ROWS) - set(re.findall(r"`([^`\s]+)`", prose))
