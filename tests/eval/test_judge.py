"""`llava eval judge`: verdicts of a real HTTP server, its faults, resumption, and the figures that follow."""

import json
import os
import pty
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava
from llava.errors import DataError, LlavaError
from llava.eval.endpoint import Endpoint, retry_after_s
from llava.eval.judge import Reviews, judge, judged_runs
from llava.eval.task import Data
from llava.eval.task_run import TaskRun
from llava.eval.tasks import task_named
from tests.command import TIMEOUT_S, assert_one_line_error, interrupt, start
from tests.eval import judging
from tests.eval.judging import (
    Fault,
    RuleJudge,
    answered,
    body,
    content,
    expected,
    half,
    hang_up,
    junk,
    run,
    run_well,
    silent,
    status,
)
from tests.eval.science import lines
from tests.serving import serving

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return judging.write_coco(tmp_path / "data")


@pytest.fixture
def done(tmp_path: Path, data: Path) -> TaskRun:
    """A run with six answers."""
    return answered(tmp_path / "run", data)


@pytest.fixture
def server() -> Iterator[RuleJudge]:
    with judging.judging() as made:
        yield made


def command(done: TaskRun, server: RuleJudge, *more: object) -> tuple[object, ...]:
    return ("eval", "judge", done.folder.parent, "--judge-url", server.url, "--judge-model", "rule", *more)


def endpoint(server: RuleJudge, **options: Any) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "rule", "backoff_s": 0.01, **options})


def judged(done: TaskRun, server: RuleJudge, *, samples: int = 1, **options: Any) -> dict[str, str]:
    """Asks for the missing verdicts in this process, and scores. Returns the errors."""
    reviews = Reviews(run=done)
    failed = judge(reviews, reviews.missing(samples), endpoint(server, **options))
    done.score()
    return failed


def scores(done: TaskRun) -> dict[str, Any]:
    return json.loads((done.folder / "scores.json").read_text())


def reviews(done: TaskRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (done.folder / "reviews.jsonl").read_text().splitlines()]


def assert_scored_as_directly(done: TaskRun) -> None:
    pairs = expected(done)
    found = scores(done)
    groups: dict[str, list[tuple[float, float]]] = {"all": list(pairs.values())}
    for one in done.questions:
        groups.setdefault(one.groups[0], []).append(pairs[one.id])
    wanted = {name: 100 * sum(c for _, c in some) / sum(r for r, _ in some) for name, some in groups.items()}
    assert found["figures"] == pytest.approx(wanted, abs=1e-12)
    assert found["value"] == found["figures"]["all"]
    assert found["details"]["10·reference"] == pytest.approx(10 * np.mean([r for r, _ in pairs.values()]))
    assert found["details"]["10·candidate"] == pytest.approx(10 * np.mean([c for _, c in pairs.values()]))
    assert (found["n"], found["unjudged"], found["details"]["unparsed verdicts"]) == (len(pairs), 0, 0)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("set_name", ["coco", "wild", "published coco"])
def test_scores_over_http_equal_the_rule_applied_directly(
    set_name: str, tmp_path: Path, server: RuleJudge, request: pytest.FixtureRequest
) -> None:
    name, folder = f"llava-bench-{set_name.split()[-1]}", tmp_path / "data"
    if set_name == "published coco":
        published = request.getfixturevalue("shared") / "data" / "llava_bench_coco"
        folder.mkdir()
        for file in published.glob("*.jsonl"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "val2014").mkdir()
        for line in (folder / "qa90_questions.jsonl").read_text(encoding="utf-8").splitlines()[:6]:
            Image.new("RGB", (90, 60), "teal").save(folder / "val2014" / json.loads(line)["image"], "PNG")
    else:
        getattr(judging, f"write_{set_name}")(folder)
    asked = run_well(
        "eval", "run", name, "--data", folder, "--limit", 6, "--out", tmp_path / "run", "--max-new-tokens", 8
    )
    assert f"llava eval judge {tmp_path / 'run'} --judge-url URL --judge-model NAME" in asked.stdout
    said = run_well("eval", "judge", tmp_path / "run", "--judge-url", server.url, "--judge-model", "rule")
    (done,) = judged_runs(tmp_path / "run")
    assert len(server.bodies) == len(done.questions) == (3 if set_name == "wild" else 6)
    assert_scored_as_directly(done)
    assert f"{scores(done)['value']:.2f}" in said.stdout
    rounded = json.loads(
        run_well("eval", "score", "llava-bench", "--reviews", done.folder / "reviews.jsonl", "--json").stdout
    )
    assert rounded[0]["relative"] == pytest.approx(scores(done)["value"], abs=0.1)  # means are rounded before the ratio
    key = "llava_bench_" if set_name == "wild" else ""
    assert {one["category"] for one in rounded} == {"all", *(key + name for name in judging.CATEGORIES)}


def test_the_judge_is_asked_as_by_the_original(shared: Path, tmp_path: Path, server: RuleJudge) -> None:
    folder = shared / "data" / "llava_bench_coco"

    def entries(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

    rules = json.loads((folder / "rule.json").read_text(encoding="utf-8"))
    contexts = {one["image"]: one for one in entries("caps_boxes_coco2014_val_80.jsonl")}
    pairs = list(zip(entries("qa90_questions.jsonl"), entries("qa90_gpt4_answer.jsonl"), strict=True))
    task = task_named("llava-bench-coco")
    questions = task.questions(Data(folder=folder))
    assert len(questions) == 90
    for ours, (question, reference) in zip(questions, pairs, strict=True):
        context = contexts[question["image"]]
        role, prompt = rules[question["category"]]["role"], rules[question["category"]]["prompt"]
        shown = "\n".join(context["captions"])
        boxes = "\n".join(f"{one['category']}: {one['bbox']}" for one in context["instances"])
        assert task.judge_prompt(ours, "My\nanswer.") == (  # type: ignore[attr-defined]
            f"[Context]\n{shown}\n\n{boxes}\n\n[Question]\n{question['text']}\n\n[{role} 1]\n{reference['text']}\n\n"
            f"[End of {role} 1]\n\n[{role} 2]\nMy\nanswer.\n\n[End of {role} 2]\n\n[System]\n{prompt}\n\n"
        )
    wild = task_named("llava-bench-wild")
    assert wild.rule == rules["llava_bench_conv"]["prompt"] == rules["llava_bench_complex"]["prompt"]  # type: ignore[attr-defined]


def test_a_request_is_that_of_the_original(done: TaskRun, server: RuleJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_JUDGE_API_KEY", "sk-secret")
    said = run_well(*command(done, server))
    first = next(one for one in server.bodies if "What is 0?" in one["messages"][1]["content"])
    prompt = first["messages"][1]["content"]
    assert prompt.startswith(
        "[Context]\nA cat number 0\nA cat.\n\ncat: [0.1, 0.25, 0.5, 0.584]\n\n[Question]\nWhat is 0?\n"
    )
    assert first == {
        "model": "rule",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
        "temperature": 0.2,
        "max_tokens": 1024,
    }
    assert {one["Authorization"] for one in server.headers} == {"Bearer sk-secret"}
    assert "sk-secret" not in said.stdout + said.stderr
    assert not any(b"sk-secret" in file.read_bytes() for file in done.folder.rglob("*") if file.is_file())


def test_verdicts_are_kept_in_the_layout_of_the_original(done: TaskRun, server: RuleJudge) -> None:
    assert judged(done, server) == {}
    answer = done.answers()["4"]
    found = reviews(done)[4]
    assert [one["question_id"] for one in reviews(done)] == list(range(6))
    assert found.pop("review_id")
    assert found == {
        "question_id": 4,
        "answer1_id": "4",  # the reference file has no answer_id
        "answer2_id": answer["answer_id"],
        "reviewer_id": "rule",
        "metadata": {"judge": "rule", "temperature": 0.2, "sample": 0},
        "content": judging.rule("What is 4?", done.questions[4].answer, answer["text"]),
        "tuple": list(expected(done)["4"]),
        "category": "detail",
    }


def test_our_own_server_is_a_judge_whose_verdicts_are_counted_as_unparsed(tmp_path: Path) -> None:
    done = answered(tmp_path / "run", judging.write_coco(tmp_path / "data", 3))
    vlm = llava.load(device="cpu")
    with serving(tmp_path / "log", vlm, "llava-tiny", "--device", "cpu") as server:
        url = f"{server.url}/v1"
        said = run("eval", "judge", done.folder.parent, "--judge-url", url, "--judge-model", "llava-tiny")
    assert said.returncode == 1, said.stderr  # there is no figure
    assert scores(done)["value"] is None
    assert scores(done)["details"]["unparsed verdicts"] == 3
    assert scores(done)["details"]["as published"] == 100.0  # -1 / -1
    assert "unparsed verdicts" in said.stdout
    assert "3 verdicts without two scores in the first line, so there is no figure" in said.stderr
    assert all(one["content"] and one["tuple"] == [-1, -1] for one in reviews(done))


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault",
    [
        status(429),
        status(429, retry_after="0"),
        status(429, retry_after="soon"),
        status(500),
        status(502),
        status(503),
        status(529),
        body(b"<html>busy</html>"),
        body(b""),
        body(b"null"),
        body(b"\xff\xfe"),
        body(b"[" * 100_000),
        body(b'{"choices": []}'),
        body(b'{"choices": [{"message": {}}]}'),
        body(b'{"choices": [{"text": "8 9"}]}'),
        content(""),
        content(" \n"),
        content(None),
        content([{"type": "text", "text": "8 9"}]),
        half,
        hang_up,
        junk,
        lambda handler: handler.send(200, b"no gzip", content_encoding="gzip"),
        lambda handler: handler.send(204, b""),
        silent,
        body(b" " * (5 << 20)),
    ],
    ids=lambda fault: getattr(fault, "__name__", ""),
)
def test_a_fault_is_repeated_until_there_is_a_verdict(fault: Fault, done: TaskRun, server: RuleJudge) -> None:
    server.faults = [fault, fault]
    assert judged(done, server, timeout_s=2 if fault is silent else 60) == {}
    assert len(server.bodies) == 8
    assert_scored_as_directly(done)


def test_the_time_that_a_server_asks_for_is_waited(done: TaskRun, server: RuleJudge) -> None:
    server.faults = [status(429, retry_after="1")]
    judged(done, server, concurrency=1)
    assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), (" 2.5", 2.5), ("", 0), ("soon", 0), ("-3", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_the_header_retry_after_is_understood(value: str, seconds: float) -> None:
    assert retry_after_s(value) == seconds


def test_a_date_in_the_header_retry_after_is_understood() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 98 <= retry_after_s(date) <= 100


@pytest.mark.parametrize("fault", [status(429), status(500), body(b"oops"), half, content("")])
def test_a_judge_that_keeps_failing_leaves_a_count_and_no_figure(
    fault: Fault, done: TaskRun, server: RuleJudge
) -> None:
    server.always = fault
    said = run(*command(done, server, "--retries", 0))
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    assert "6 verdicts missing; run the same command again to ask for them" in said.stderr
    assert "6 answers without a verdict, 0 questions without an answer" in said.stderr
    assert (scores(done)["value"], scores(done)["n"], scores(done)["unjudged"]) == (None, 0, 6)
    server.always = None
    run_well(*command(done, server, "--retries", 0))
    assert_scored_as_directly(done)


def test_a_judge_that_fails_now_and_then_leaves_a_count_and_the_figure_of_the_others(
    done: TaskRun, server: RuleJudge
) -> None:
    server.faults = [status(500), status(400)]
    said = run(*command(done, server, "--retries", 0, "--concurrency", 1))
    assert said.returncode == 1
    assert "question 0: no verdict: status 500" in said.stderr
    assert "2 answers without a verdict" in said.stderr
    assert (scores(done)["n"], scores(done)["unjudged"], list(scores(done)["items"])) == (4, 2, list("2345"))


def test_a_judge_that_fails_for_many_questions_in_a_row_is_asked_no_more(tmp_path: Path, server: RuleJudge) -> None:
    done = answered(tmp_path / "run", judging.write_coco(tmp_path / "data", 30))
    server.always = status(500)
    failed = judged(done, server, retries=0, concurrency=2)
    assert len(failed) == 30
    assert len(server.bodies) <= 6
    assert sum(error.startswith("not asked") for error in failed.values()) == 30 - len(server.bodies)


def test_nobody_at_the_address_is_a_count(done: TaskRun) -> None:
    nobody = RuleJudge(url="http://127.0.0.1:1/v1")
    said = run(*command(done, nobody, "--retries", 0))
    assert said.returncode == 1
    assert "ConnectError" in said.stderr
    assert "6 answers without a verdict" in said.stderr


@pytest.mark.parametrize("text", ["\ud800 9", "8 9\n\ud800\u2028\x00", "85 90", "8 9" * 100_000])
def test_odd_verdicts_are_kept_as_they_are(text: str, done: TaskRun, server: RuleJudge) -> None:
    server.verdict = lambda *_: text
    said = run(*command(done, server))
    assert "Traceback" not in said.stderr
    assert said.returncode == (0 if text[:3] in ("8 9", "85 ") and len(text) < 100 else 1)
    assert {one["content"] for one in reviews(done)} == {text}
    assert ("6 verdicts with a score that is not from 0 to 10" in said.stderr) == (text == "85 90")


def test_a_host_that_cannot_exist_is_one_line(done: TaskRun) -> None:
    said = run(*command(done, RuleJudge(url="http://xn--a/v1")))
    assert said.returncode == 2
    assert "http://xn--a/v1/chat/completions refuses requests: not an address" in said.stderr.splitlines()[-1]


@pytest.mark.parametrize("code", [401, 403, 404, 302])
def test_a_server_that_refuses_everything_is_asked_once(
    code: int, done: TaskRun, server: RuleJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_JUDGE_API_KEY", "sk-secret")
    server.always = lambda handler: handler.send(code, b"no: sk-secret", location="http://127.0.0.1:1/v1")
    said = run(*command(done, server, "--concurrency", 1))
    assert said.returncode == 2
    line = said.stderr.splitlines()[-1]
    assert f"refuses requests: status {code}: no: …; check --judge-url, --judge-model and the key" in line
    assert "sk-secret" not in said.stderr
    assert len(server.bodies) == 1


# ------------------------------------------------------------------------------------------------------- interruption


def test_a_killed_judge_continues_and_gives_the_same_scores(tmp_path: Path, data: Path) -> None:
    with judging.judging(delay_s=0.3) as server:
        whole, killed = (answered(tmp_path / name, data) for name in ("whole", "killed"))
        judged(whole, server, samples=2)
        before = len(server.bodies)
        process = start(*command(killed, server, "--samples", 2, "--concurrency", 2))
        file = killed.folder / "reviews.jsonl"
        end = time.monotonic() + TIMEOUT_S
        while not file.exists() or file.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = file.read_bytes()
        with file.open("ab") as torn:
            torn.write(kept.splitlines(True)[0][:40])  # as if the kill had come while a line was written
        time.sleep(0.5)  # until the server has answered what nobody reads
        in_between = len(server.bodies)
        assert 3 <= in_between - before < 12
        run_well(*command(killed, server, "--samples", 2))
        assert len(server.bodies) - in_between == 12 - kept.count(b"\n")
    assert (killed.folder / "scores.json").read_bytes() == (whole.folder / "scores.json").read_bytes()
    assert file.read_bytes() == (whole.folder / "reviews.jsonl").read_bytes()


def test_ctrl_c_ends_the_command_in_one_line_and_keeps_what_came(tmp_path: Path, done: TaskRun) -> None:
    with judging.judging(delay_s=0.5) as server:
        process = start(*command(done, server, "--concurrency", 1))
        end = time.monotonic() + TIMEOUT_S
        while not (done.folder / "reviews.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        code, _, err = interrupt(process)
    assert code == 130
    assert err.splitlines()[-1] == "llava: interrupted"
    assert "Traceback" not in err
    assert 1 <= len(reviews(done)) < 6


def test_a_run_is_judged_where_its_pictures_are_not(
    tmp_path: Path, server: RuleJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    judging.write_coco(tmp_path / "data")
    asked = ("eval", "run", "llava-bench-coco", "--data", "data", "--limit", 2, "--out", "run", "--max-new-tokens", 2)
    run_well(*asked, "--device", "cpu")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    line = ("eval", "judge", "run", "--judge-url", server.url, "--judge-model", "rule")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_well(*line)
    shutil.rmtree(tmp_path / "data")
    said = run_well(*line, "--samples", 2, "--json")
    assert len(server.bodies) == 4
    assert json.loads(said.stdout)["llava-bench-coco"]["n"] == 2


def test_nothing_is_asked_when_all_verdicts_are_there(done: TaskRun, server: RuleJudge) -> None:
    run_well(*command(done, server))
    n, before = len(server.bodies), (done.folder / "scores.json").read_bytes()
    (done.folder / "scores.json").unlink()
    run_well("eval", "judge", done.folder.parent)
    assert len(server.bodies) == n
    assert (done.folder / "scores.json").read_bytes() == before


def test_two_processes_do_not_judge_the_same_answers(done: TaskRun, server: RuleJudge) -> None:
    with Reviews(run=done).locked():
        assert_one_line_error(run(*command(done, server)), "another process judges these answers")
    run_well(*command(done, server))


@pytest.mark.parametrize("change", [("--temperature", 0.5), ("--judge-model", "other")])
def test_verdicts_of_another_judge_are_not_mixed_in(
    change: tuple[object, ...], done: TaskRun, server: RuleJudge
) -> None:
    run_well(*command(done, server))
    said = run(*command(done, server, "--samples", 2, *change))
    assert_one_line_error(said, "a verdict of rule at temperature 0.2", "move", "reviews.jsonl elsewhere")


def test_verdicts_on_other_answers_are_refused(done: TaskRun, server: RuleJudge) -> None:
    run_well(*command(done, server))
    file = done.folder / "answers.jsonl"
    file.write_text(file.read_text().replace(done.answers()["3"]["answer_id"], "new"))
    said = run("eval", "judge", done.folder.parent)
    assert_one_line_error(said, "1 verdict on other answers than those of the run, the first for question 3")


# ------------------------------------------------------------------------------------------------- pace, cost, terminal


def test_requests_keep_the_rate_and_the_concurrency(done: TaskRun) -> None:
    with judging.judging(delay_s=0.3) as server:
        judged(done, server, concurrency=2)
        assert server.most_at_once == 2
    (done.folder / "reviews.jsonl").unlink()
    with judging.judging() as server:
        started = time.monotonic()
        judged(done, server, per_minute=600, concurrency=6)
        assert time.monotonic() - started >= 0.5
        assert len(server.bodies) == 6


def test_the_cost_is_estimated_before_the_start(done: TaskRun, server: RuleJudge) -> None:
    said = run_well(*command(done, server, "--price-in", 30, "--price-out", 60, "--requests-per-minute", 6000))
    n_bytes = [len(SYSTEM + body["messages"][1]["content"]) for body in server.bodies]
    tokens = sum(-(-n // 4) for n in n_bytes)
    assert f"6 verdicts of rule: about {tokens:,} tokens of requests (4 bytes each), at most 6,144" in said.stderr
    assert f"at most about {(tokens * 30 + 6144 * 60) / 1e6:,.2f}, at 30 and 60" in said.stderr


@pytest.mark.parametrize(("typed", "more", "n"), [("n\n", (), 0), ("y\n", (), 6), ("", ("--yes",), 6)])
def test_a_terminal_is_asked_before_the_start(
    typed: str, more: tuple[str, ...], n: int, done: TaskRun, server: RuleJudge
) -> None:
    ours, theirs = pty.openpty()
    process = start(*command(done, server, *more), stdin=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed.encode())
    out = process.stdout.read() if process.stdout else b""
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    assert (process.wait(TIMEOUT_S) == 0) == bool(n), (out, shown)
    assert (b"ask the judge?" in shown) == (not more)
    assert len(server.bodies) == n


@pytest.mark.parametrize(
    ("url", "key", "exposed"),
    [
        ("http://judge.example/v1", "key", True),
        ("https://judge.example/v1", "key", False),
        ("http://judge.example/v1", "", False),
        ("http://127.0.0.1:8000/v1", "key", False),
        ("http://[::1]:8000/v1", "key", False),
        ("http://localhost:8000/v1", "key", False),
        ("http://127.0.0.1.judge.example/v1", "key", True),
    ],
)
def test_a_key_that_others_can_read_is_warned_of(url: str, key: str, exposed: bool) -> None:
    assert Endpoint(url=url, model="m", key=key).exposes_key == exposed
    assert "key" not in repr(Endpoint(url="https://x/v1", model="m", key="key")).replace("key=", "")


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_an_address_may_end_in_several_ways(end: str) -> None:
    assert Endpoint(url=f"http://x/v1{end}", model="m").address == "http://x/v1/chat/completions"


# ------------------------------------------------------------------------------------------------- figures and samples


def test_several_verdicts_on_an_answer_are_averaged_and_their_variance_is_stated(tmp_path: Path, data: Path) -> None:
    counts: dict[str, int] = {}

    def varying(question: str, reference: str, candidate: str) -> str:
        counts[question] = n = counts.get(question, 0) + 1
        return f"{7 + n % 2} {3 + (n * len(candidate)) % 5}"

    done = answered(tmp_path / "run", data)
    with judging.judging(verdict=varying) as server:
        said = run_well(*command(done, server, "--samples", 3, "--concurrency", 1))
    pairs = np.array([[one["tuple"] for one in reviews(done)[3 * i : 3 * i + 3]] for i in range(6)])
    assert [one["metadata"]["sample"] for one in reviews(done)] == [0, 1, 2] * 6
    means = pairs.mean(1)
    ratio = means[:, 1].sum() / means[:, 0].sum()
    assert scores(done)["value"] == pytest.approx(100 * ratio)
    residuals = pairs[:, :, 1] - ratio * pairs[:, :, 0]
    error = 100 * np.sqrt((residuals.var(1, ddof=1) / 3).sum()) / means[:, 0].sum()
    assert scores(done)["details"]["standard error of the judge"] == pytest.approx(error)
    assert f"{error:.2f}" in said.stdout
    again = run_well("eval", "judge", done.folder.parent)  # uses all of them
    assert f"{100 * ratio:.2f}" in again.stdout


def test_a_single_verdict_has_no_variance(done: TaskRun, server: RuleJudge) -> None:
    judged(done, server)
    assert scores(done)["details"]["standard error of the judge"] is None


@pytest.mark.parametrize("samples", [1, 2])
def test_unparsed_verdicts_are_left_out_or_averaged_in(samples: int, tmp_path: Path, data: Path) -> None:
    done = answered(tmp_path / "run", data)

    def sometimes(question: str, reference: str, candidate: str) -> str:
        return (
            "Both are good."
            if question in ("What is 1?", "What is 5?")
            else judging.rule(question, reference, candidate)
        )

    with judging.judging(verdict=sometimes) as server:
        said = run_well(*command(done, server, "--samples", samples))
    pairs = expected(done)
    sound = np.array([pairs[id] for id in "0234"])
    published = np.array([pairs[id] if id not in "15" else (-1, -1) for id in "012345"])
    found = scores(done)
    assert found["details"]["unparsed verdicts"] == 2 * samples
    assert f"{2 * samples} verdicts without two scores in the first line, left out" in said.stderr
    assert (found["n"], found["unjudged"]) == (6, 0)
    for value, used in ((found["value"], sound), (found["details"]["as published"], published)):
        assert value == pytest.approx(100 * used[:, 1].sum() / used[:, 0].sum())
        assert f"{value:.2f}" in said.stdout
    assert found["details"]["10·candidate as published"] == pytest.approx(10 * published[:, 1].mean())
    file = done.folder / "reviews.jsonl"
    for flag, used in (((), sound), (("--as-published",), published)):
        (row, *_) = json.loads(run_well("eval", "score", "llava-bench", "--reviews", file, "--json", *flag).stdout)
        reference, candidate = np.round(used.mean(0), 3)
        assert row["relative"] == round(candidate / reference * 100, 1)
        assert row["unparsed"] == 2 * samples


# ------------------------------------------------------------------------------------------------------------- files


def verdict_lines(done: TaskRun, **more: Any) -> list[dict[str, Any]]:
    return [{"question_id": int(id), "tuple": list(pair), **more} for id, pair in expected(done).items()]


def test_a_file_of_verdicts_takes_the_place_of_a_judge(done: TaskRun, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_bytes(lines(*reversed(verdict_lines(done)), {"question_id": 99, "tuple": [8, 9]}))
    for _ in range(2):  # the second time, they are there
        said = run_well("eval", "judge", done.folder.parent, "--verdicts", tmp_path / "v.jsonl")
        assert "1 verdict on questions that the run does not answer, left out" in said.stderr
        assert_scored_as_directly(done)


def test_a_file_of_verdicts_and_a_judge_are_one_too_many(done: TaskRun, server: RuleJudge, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_bytes(lines(*verdict_lines(done)))
    line = command(done, server, "--verdicts", tmp_path / "v.jsonl")
    assert_one_line_error(run(*line), "no judge is asked; omit --judge-url and --judge-model")


def test_a_file_with_too_few_verdicts_leaves_a_count(done: TaskRun, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_bytes(lines(*verdict_lines(done)[:4]))
    said = run("eval", "judge", done.folder.parent, "--verdicts", tmp_path / "v.jsonl", "--json")
    assert said.returncode == 1
    assert "2 answers without a verdict" in said.stderr
    assert json.loads(said.stdout)["llava-bench-coco"]["unjudged"] == 2


Change = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all: [one | {"answer2_id": "x"} for one in all], "6 verdicts on other answers than those of the run"),
        (lambda all: [one | {"question_id": 50 + i} for i, one in enumerate(all)], "has no verdict on a question"),
        (lambda all: [one | {"tuple": [8]} for one in all], "line 1: tuple is [8]"),
        (lambda all: [{"tuple": [8, 9]}], "line 1: question_id is None"),
        (lambda all: [], "contains no verdicts"),
    ],
)
def test_a_file_of_other_verdicts_is_refused(change: Change, said: str, done: TaskRun, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_bytes(lines(*change(verdict_lines(done))))
    refused = run("eval", "judge", done.folder.parent, "--verdicts", tmp_path / "v.jsonl")
    assert_one_line_error(refused, "v.jsonl", said)
    assert not (done.folder / "reviews.jsonl").exists()


def test_a_file_does_not_replace_the_verdicts_of_a_judge(done: TaskRun, server: RuleJudge, tmp_path: Path) -> None:
    judged(done, server)
    (tmp_path / "v.jsonl").write_bytes(lines(*verdict_lines(done)))
    said = run("eval", "judge", done.folder.parent, "--verdicts", tmp_path / "v.jsonl")
    assert_one_line_error(said, "reviews.jsonl: has other verdicts than", "move it elsewhere to use the file")


def test_with_two_tasks_a_file_needs_the_name_of_one(tmp_path: Path, done: TaskRun) -> None:
    answered(tmp_path / "run", judging.write_wild(tmp_path / "wild"), "llava-bench-wild")
    (tmp_path / "v.jsonl").write_bytes(lines(*verdict_lines(done)))
    line = ("eval", "judge", done.folder.parent, "--verdicts", tmp_path / "v.jsonl")
    assert_one_line_error(run(*line), "choose one of llava-bench-wild, llava-bench-coco with --task")
    run_well(*line, "--task", "llava-bench-coco")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--judge-url", "127.0.0.1:8000"), "--judge-url is '127.0.0.1:8000'; expected an address"),
        (("--judge-url", " http://x/v1"), "--judge-url is ' http://x/v1'"),
        (("--judge-url", "http://x y/v1"), "--judge-url is 'http://x y/v1'"),
        (("--judge-url", "ftp://x/v1"), "--judge-url is 'ftp://x/v1'"),
        (("--judge-url", "http://x:y/v1"), "--judge-url: Port could not be cast"),
        (("--judge-url", "https://me:secret@x/v1"), "--judge-url has a user name or a key in it"),
        (("--judge-url", "http://x/v1?key=secret"), "--judge-url is"),
        (("--judge-model", ""), "--judge-model is empty"),
        (("--temperature", -1), "--temperature is -1"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--requests-per-minute", 0), "--requests-per-minute is 0"),
        (("--timeout", 0), "--timeout is 0"),
        (("--price-in", 1), "pass both --price-in and --price-out"),
        (("--task", "pope"), "has no answers to judge of a task pope"),
    ],
)
def test_an_invalid_option_is_refused_in_one_line(
    more: tuple[object, ...], said: str, done: TaskRun, server: RuleJudge
) -> None:
    assert_one_line_error(run(*command(done, server, *more)), said)
    assert server.bodies == []


def test_without_a_judge_one_line_says_what_to_pass(done: TaskRun) -> None:
    said = run("eval", "judge", done.folder.parent, "--verdicts", "missing.jsonl")
    assert_one_line_error(said, "missing.jsonl: cannot be read")
    said = run("eval", "judge", done.folder.parent)
    assert_one_line_error(said, "pass --judge-url and --judge-model, or a file of verdicts with --verdicts")


def test_a_run_that_is_not_complete_is_refused(tmp_path: Path, done: TaskRun, server: RuleJudge) -> None:
    assert_one_line_error(run("eval", "judge", tmp_path), "has no answers to judge")
    (done.folder / "answers.jsonl").rename(done.folder / "answers.partial.0.jsonl")
    assert_one_line_error(run(*command(done, server)), "its answers are not complete")


# --------------------------------------------------------------------------------------------- what the task expects


def rewrite(file: Path, change: Callable[[list[Any]], Any]) -> None:
    values = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_bytes(lines(*change(values)))


QUESTIONS, ANSWERS, CONTEXT = "qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (ANSWERS, lambda all: all[:4], "has no reference answer to 2 questions (question_id 4, 5)"),
        (CONTEXT, lambda all: all[:1], "has no description of the picture of 3 questions (question_id 3, 4, 5)"),
        (ANSWERS, lambda all: [*all, all[2]], "line 3: question_id 2 is there again in a later line"),
        (QUESTIONS, lambda all: [*all, all[2]], "line 3: question_id 2 is there again in a later line"),
        (QUESTIONS, lambda all: [], "is empty; expected questions"),
        (QUESTIONS, lambda all: [all[0] | {"category": "other"}], "line 1: category is 'other'"),
        (ANSWERS, lambda all: [one | {"text": None} for one in all], "line 1: text is None"),
        (CONTEXT, lambda all: [one | {"captions": "A cat."} for one in all], "line 1: captions is 'A cat.'"),
        (CONTEXT, lambda all: [one | {"instances": [{}]} for one in all], "line 1: instances is [{}]"),
    ],
)
def test_what_the_judge_needs_is_checked_before_the_first_question(
    file: str, change: Change, said: str, data: Path
) -> None:
    rewrite(data / file, change)
    with pytest.raises(DataError) as error:
        task_named("llava-bench-coco").questions(Data(folder=data))
    assert said in str(error.value)


def test_pictures_may_have_the_names_of_cocos_archive(data: Path) -> None:
    for file in (data / "val2014").iterdir():
        file.rename(file.with_name(f"COCO_val2014_{file.name}"))
    questions = task_named("llava-bench-coco").questions(Data(folder=data))
    assert all(one.images[0].is_file() for one in questions)


@pytest.mark.parametrize(("caption", "shown"), [("One\ntext.", "One\ntext."), (["Two", "lines"], "Two\nlines")])
def test_a_caption_may_have_several_lines(caption: Any, shown: str, tmp_path: Path) -> None:
    folder = judging.write_wild(tmp_path / "data")
    rewrite(folder / "context.jsonl", lambda all: [one | {"caption": caption} for one in all])
    (first, *_) = task_named("llava-bench-wild").questions(Data(folder=folder))
    assert first.values == {"context": shown, "reference_id": "gpt0", "category": "llava_bench_conv"}


def test_a_verdict_that_cannot_be_written_is_one_line(done: TaskRun, server: RuleJudge) -> None:
    (done.folder / "reviews.jsonl").mkdir()
    with pytest.raises(LlavaError, match="cannot be written"):
        judge(Reviews(run=done), [case for case in _cases(done)], endpoint(server))


def _cases(done: TaskRun) -> list[Any]:
    from llava.eval.judge import Case

    return [Case(one, done.answers()[one.id], 0) for one in done.questions]
