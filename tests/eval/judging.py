"""A judge behind OpenAI's protocol that scores by a rule, faults of such a server, and runs for it to judge."""

import contextlib
import io
import json
import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from llava.cli import app, main
from llava.cli.advice import AdviceFormatter, Command
from llava.eval.task import Data, Question
from llava.eval.task_run import TaskRun
from llava.eval.tasks import task_named
from tests.eval.science import lines

PROMPT = re.compile(
    r"\[Context\]\n(.*)\n\n\[Question\]\n(.*)\n\n\[Assistant 1\]\n(.*)\n\n\[End of Assistant 1\]\n\n"
    r"\[Assistant 2\]\n(.*)\n\n\[End of Assistant 2\]\n\n\[System\]\n(We would like .*)\n\n",
    re.DOTALL,
)
CATEGORIES = ("conv", "detail", "complex")


def run(*args: object) -> Any:
    """Runs `llava ARGS` in this process, in which servers of the test answer, and returns what a process would."""
    line = [str(arg) for arg in args]
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setFormatter(AdviceFormatter(Command.running(typer.main.get_command(app), line)))
    logging.getLogger("llava").addHandler(handler)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(line)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        logging.getLogger("llava").removeHandler(handler)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def run_well(*args: object) -> Any:
    """Like `run`, and asserts that the command succeeds."""
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return done


def rule(question: str, reference: str, candidate: str) -> str:
    """The verdict: 5 to 10 by the length of the reference, and half a point for each of its words in the candidate."""
    words = [set(text.lower().split()) for text in (reference, candidate)]
    return f"{5 + len(reference) % 6} {min(10, 1 + len(words[0] & words[1]) / 2)}\nAbout {question}"


Fault = Callable[["Handler"], None]


@dataclass
class RuleJudge:
    """A server, the bodies that it got, and the faults with which it answers before it begins to work."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None  # a fault that does not end
    verdict: Callable[[str, str, str], str] = rule
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self) -> list[str]:
        """The questions in the order in which they came."""
        return [PROMPT.fullmatch(body["messages"][1]["content"])[2] for body in self.bodies]  # type: ignore[index]


class Handler(BaseHTTPRequestHandler):
    judge: RuleJudge
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        judge = self.judge
        with judge.lock:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            judge.bodies.append(body)
            judge.headers.append(dict(self.headers))
            judge.times.append(time.monotonic())
            fault = judge.always or (judge.faults.pop(0) if judge.faults else None)
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            time.sleep(judge.delay_s)
            if fault:
                fault(self)
            else:
                self.send_verdict(body)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def send_verdict(self, body: Mapping[str, Any]) -> None:
        found = PROMPT.fullmatch(body["messages"][1]["content"])
        if self.path != "/v1/chat/completions" or not found:
            self.send(400, b"not a prompt of a judge")
            return
        self.reply(self.judge.verdict(found[2], found[3], found[4]))

    def reply(self, content: Any) -> None:
        self.send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode())

    def send(self, status: int, data: bytes, *, n_more: int = 0, **headers: str) -> None:
        """Sends a response. n_more: bytes that the header promises and that do not come."""
        self.send_response(status)
        for name, value in {"content-length": str(len(data) + n_more), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = n_more > 0

    def log_message(self, *_: Any) -> None:
        pass


def status(code: int, **headers: str) -> Fault:
    return lambda handler: handler.send(code, b'{"error": {"message": "too busy"}}', **headers)


def body(data: bytes) -> Fault:
    return lambda handler: handler.send(200, data)


def content(value: Any) -> Fault:
    return lambda handler: handler.reply(value)


def half(handler: Handler) -> None:
    handler.send(200, b'{"choices": [{"message": {"cont', n_more=50)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def junk(handler: Handler) -> None:
    handler.wfile.write(b"\x00\xff no protocol\r\n\r\n")
    handler.close_connection = True


def silent(handler: Handler) -> None:
    time.sleep(5)
    handler.close_connection = True


@contextmanager
def judging(**options: Any) -> Iterator[RuleJudge]:
    """Runs a judge until the block ends."""
    judge = RuleJudge(**options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"judge": judge}))
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --------------------------------------------------------------------------------------------------- data and answers


def write_coco(folder: Path, n: int = 6) -> Path:
    """Questions about n / 3 pictures, in the layout of LLaVA-Bench (COCO)."""
    (folder / "val2014").mkdir(parents=True)
    images = [f"{i:012}.jpg" for i in range(n // 3)]
    for i, image in enumerate(images):
        Image.new("RGB", (80, 60), (40 * i, 200, 90)).save(folder / "val2014" / image, "PNG")
    questions = [
        {"question_id": i, "image": images[i // 3], "text": f"What is {i}?", "category": CATEGORIES[i % 3]}
        for i in range(n)
    ]
    answers = [
        {"question_id": i, "text": f"The picture {'really ' * i}shows a cat", "category": CATEGORIES[i % 3]}
        for i in range(n)
    ]
    contexts = [
        {
            "id": str(i),
            "image": image,
            "captions": [f"A cat number {i}", "A cat."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.25, 0.5, 0.584]}],
        }
        for i, image in enumerate(images)
    ]
    (folder / "qa90_questions.jsonl").write_bytes(lines(*questions))
    (folder / "qa90_gpt4_answer.jsonl").write_bytes(lines(*answers))
    (folder / "caps_boxes_coco2014_val_80.jsonl").write_bytes(lines(*contexts))
    return folder


def write_wild(folder: Path) -> Path:
    """Three questions about one picture, in the layout of LLaVA-Bench (In-the-Wild)."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (80, 60), "red").save(folder / "images" / "001.jpg", "PNG")
    asked = [
        {"question_id": i, "image": "001.jpg", "text": f"Why {i}?", "category": category}
        for i, category in enumerate(CATEGORIES)
    ]
    answers = [{"question_id": i, "text": f"Because of {i}.", "answer_id": f"gpt{i}"} for i in range(3)]
    (folder / "questions.jsonl").write_bytes(lines(*asked))
    (folder / "answers_gpt4.jsonl").write_bytes(lines(*answers))
    (folder / "context.jsonl").write_bytes(lines({"id": "001", "image": "001.jpg", "caption": "A red wall."}))
    return folder


def answered(folder: Path, data: Path, name: str = "llava-bench-coco") -> TaskRun:
    """A run whose answers are complete, as `evaluate` leaves it. The n-th one shares more words with the reference."""
    task = task_named(name)
    run = TaskRun(task=task, questions=task.questions(Data(folder=data)), folder=folder / name, model="m")
    run.open({})
    for i, question in enumerate(run.questions):
        run.add(question, " ".join(["The", "picture", "shows", "a", "cat"][: 1 + i % 5]), {})
    run.finish({})
    return run


def expected(run: TaskRun) -> dict[str, tuple[float, float]]:
    """The rule's scores of reference and candidate, by question, applied directly."""

    def scores(question: Question) -> tuple[float, float]:
        first, second = rule(question.text, question.answer, run.answers()[question.id]["text"]).split("\n")[0].split()
        return float(first), float(second)

    return {one.id: scores(one) for one in run.questions}
