"""Advice about judging the answers of a run."""

import os
import sys
from typing import Any
from unittest import mock

from llava.eval.judge import Reviews, judged_runs
from llava.eval.task_run import TaskRun
from tests.advice.table import Run, Steps, World, advice, say
from tests.eval import judging
from tests.eval.judging import RuleJudge, answered, expected
from tests.eval.science import lines


def a_run(w: World) -> TaskRun:
    return answered(w / "run", judging.write_coco(w / "data"))


def judge(w: World, server: RuleJudge, **options: object) -> Run:
    """Judges the run. options: by their names, instead of the right ones."""
    if not (w / "run").exists():
        a_run(w)
    given = {"judge_url": server.url, "judge_model": "rule", **options}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ("eval", "judge", w / "run", *words)


def verdicts(done: TaskRun, **more: Any) -> bytes:
    return lines(*[{"question_id": id, "tuple": list(pair), **more} for id, pair in expected(done).items()])


@advice("to judge the answers, run: {}")
def answers_that_need_a_judge(w: World) -> Steps:
    data = judging.write_coco(w / "data")
    out = w / "out"
    command = ("eval", "run", "llava-bench-coco", "--data", data, "--limit", 1, "--max-new-tokens", 2, "--out", out)
    said = yield (*command, "--device", "cpu")
    with judging.judging() as server:
        yield said.advised(URL=server.url, NAME="rule")


@advice("answers without a verdict; pass --judge-url and --judge-model, or a file of verdicts with --verdicts")
def no_judge(w: World) -> Steps:
    done = a_run(w)
    yield ("eval", "judge", w / "run")
    (w / "verdicts.jsonl").write_bytes(verdicts(done))
    yield ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl")


@advice("one price without the other; pass both --price-in and --price-out, or neither")
def one_price(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, price_in=1)
        yield judge(w, server, price_in=1, price_out=2)


@advice("--verdicts is for one task; choose one of {} with --task")
def a_file_of_verdicts_for_two_tasks(w: World) -> Steps:
    done = a_run(w)
    answered(w / "run", judging.write_wild(w / "wild"), "llava-bench-wild")
    (w / "verdicts.jsonl").write_bytes(verdicts(done))
    said = yield ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl")
    assert "llava-bench-wild, llava-bench-coco" in said.text
    yield ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl", "--task", "llava-bench-coco")


@advice("llava eval judge needs httpx: pip install 'llava-native[eval]'")
def no_httpx(w: World) -> Steps:
    with judging.judging() as server:
        with mock.patch.dict(sys.modules, {"httpx": None}):
            yield judge(w, server)
        yield judge(w, server)


@advice("the key in {} is sent without encryption, because --judge-url begins with http:", succeeds=False)
def a_key_without_encryption(w: World) -> Steps:
    with judging.judging() as server, mock.patch.dict(os.environ, {"LLAVA_JUDGE_API_KEY": "key"}):
        yield judge(w, server, judge_url="http://judge.invalid/v1", retries=0)
        yield judge(w, server, judge_url="https://judge.invalid/v1", retries=0)


@advice("time: at least {} minutes, because of --requests-per-minute")
def a_rate(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, requests_per_minute=6000)
        yield judge(w, server)


@advice("{} missing; run the same command again to ask for them")
def a_judge_that_fails_for_a_while(w: World) -> Steps:
    with judging.judging(faults=[judging.status(500)]) as server:
        yield judge(w, server, retries=0)
        yield judge(w, server, retries=0)


@advice("--judge-model is empty; expected the name of a model, as the endpoint has it")
def no_name_of_a_judge(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, judge_model="")
        yield judge(w, server)


@advice("--temperature is {}; expected 0 to 2")
def a_temperature_of_a_judge(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, temperature=3)
        yield judge(w, server, temperature=2)


@advice("--requests-per-minute is {}; expected a number above 0")
def a_rate_of_nothing(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, requests_per_minute=0)
        yield judge(w, server, requests_per_minute=60_000)


@advice("--timeout is {}; expected seconds above 0")
def no_time_for_a_judge(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, timeout=0)
        yield judge(w, server, timeout=60)


@advice("the key of the judge has characters other than printable ASCII; correct the variable")
def a_key_with_a_line_end(w: World) -> Steps:
    with judging.judging() as server:
        with mock.patch.dict(os.environ, {"LLAVA_JUDGE_API_KEY": "key\n"}):
            yield judge(w, server)
        with mock.patch.dict(os.environ, {"LLAVA_JUDGE_API_KEY": "key"}):
            yield judge(w, server)


@advice("--judge-url: {}; {}")
def a_port_that_is_no_number(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, judge_url="http://127.0.0.1:port/v1")
        yield judge(w, server)


@advice("--judge-url has a user name or a key in it; {}, and a key only in the environment")
def a_key_in_an_address(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, judge_url="https://key@judge.invalid/v1")
        yield judge(w, server)


@advice("--judge-url is {}; {}")
def no_address(w: World) -> Steps:
    with judging.judging() as server:
        yield judge(w, server, judge_url="127.0.0.1:8000")
        yield judge(w, server)


@advice("{}: its answers are not complete; run the same llava eval run command again")
def answers_that_are_not_complete(w: World) -> Steps:
    with judging.judging() as server:
        data = judging.write_coco(w / "data")
        command = ("eval", "run", "llava-bench-coco", "--data", data, "--limit", 1, "--max-new-tokens", 2)
        asking = (*command, "--out", w / "run", "--device", "cpu")
        assert say(asking).well
        answers = w / "run" / "llava-bench-coco" / "answers.jsonl"
        answers.rename(answers.with_name("answers.partial.0.jsonl"))
        yield judge(w, server)
        assert say(asking).well
        yield judge(w, server)


@advice("{}: another process judges these answers; wait for its end")
def two_processes(w: World) -> Steps:
    with judging.judging() as server:
        with Reviews(run=a_run(w)).locked():
            yield judge(w, server)
        yield judge(w, server)


@advice("{}: a verdict of {}, and this judge is {}; move {} elsewhere to start anew")
def verdicts_of_another_judge(w: World) -> Steps:
    with judging.judging(faults=[judging.status(400)]) as server:
        say(judge(w, server))
        yield judge(w, server, judge_model="other")
        (run,) = judged_runs(w / "run")
        (run.folder / "reviews.jsonl").rename(w / "elsewhere.jsonl")
        yield judge(w, server, judge_model="other")


@advice("{}: has other verdicts than {}; move it elsewhere to use the file")
def verdicts_of_a_judge_and_a_file(w: World) -> Steps:
    done = a_run(w)
    (done.folder / "reviews.jsonl").write_bytes(verdicts(done))
    (w / "verdicts.jsonl").write_bytes(verdicts(done, content="8 9"))
    yield ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl")
    (done.folder / "reviews.jsonl").rename(w / "elsewhere.jsonl")


@advice("{} refuses requests: {}; check --judge-url, --judge-model and the key")
def a_model_that_the_judge_does_not_have(w: World) -> Steps:
    with judging.judging(faults=[judging.status(404)] * 4) as server:
        yield judge(w, server)
        server.faults.clear()
        yield judge(w, server)


@advice("{}: {} on other answers than those of the run, the first for question {} (answer2_id); remove these lines")
def verdicts_on_other_answers(w: World) -> Steps:
    done = a_run(w)
    (w / "verdicts.jsonl").write_bytes(verdicts(done) + lines({"question_id": 0, "tuple": [8, 9], "answer2_id": "x"}))
    yield ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl")
    (w / "verdicts.jsonl").write_bytes(verdicts(done))


@advice("with --verdicts FILE, no judge is asked; omit --judge-url and --judge-model, or --verdicts")
def a_file_of_verdicts_and_a_judge(w: World) -> Steps:
    done = a_run(w)
    (w / "verdicts.jsonl").write_bytes(verdicts(done))
    command = ("eval", "judge", w / "run", "--verdicts", w / "verdicts.jsonl")
    yield (*command, "--judge-url", "http://127.0.0.1:9", "--judge-model", "rule")
    yield command
