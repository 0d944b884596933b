"""The command eval judge."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.app import progress_bar
from llava.cli.eval import evaluation
from llava.cli.options import AsJson, grouped
from llava.errors import ConfigError, counted

if TYPE_CHECKING:
    from llava.eval.endpoint import Endpoint
    from llava.eval.judge import Case, Estimate, Reviews
    from llava.eval.task import Scores

_KEY = "LLAVA_JUDGE_API_KEY"
_SHOWN = 3  # errors on stderr; the others are counted


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Where the judge is, and how it is asked."""

    judge_url: Annotated[
        str | None,
        typer.Option("--judge-url", help=f"of any server with OpenAI's API: http://127.0.0.1:8000/v1; key: {_KEY}"),
    ] = None
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="name of the judge on the server")] = None
    temperature: Annotated[float, typer.Option("--temperature", help="of the judge; the original uses 0.2")] = 0.2
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="requests at a time")] = 4
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests-per-minute", help="at most, with those that are repeated")
    ] = None
    retries: Annotated[int, typer.Option("--retries", min=0, help="of a request that fails")] = 5
    timeout: Annotated[float, typer.Option("--timeout", help="seconds to wait for a reply")] = 120.0

    def endpoint(self) -> "Endpoint":
        """Returns the endpoint. Raises ConfigError."""
        if self.judge_url is None or self.judge_model is None:
            raise ConfigError(
                "answers without a verdict; pass --judge-url and --judge-model, or a file of verdicts with --verdicts"
            )
        from llava.eval.endpoint import Endpoint

        return Endpoint(
            url=self.judge_url,
            model=self.judge_model,
            key=os.environ.get(_KEY, ""),
            temperature=self.temperature,
            concurrency=self.concurrency,
            per_minute=self.requests_per_minute,
            retries=self.retries,
            timeout_s=self.timeout,
        )


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What is known about the cost of the judge."""

    price_in: Annotated[float | None, typer.Option("--price-in", min=0, help="of a million tokens of requests")] = None
    price_out: Annotated[float | None, typer.Option("--price-out", min=0, help="of a million tokens of replies")] = None
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before the start")] = False

    def check(self) -> None:
        """Raises ConfigError if only one of the prices is given."""
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError("one price without the other; pass both --price-in and --price-out, or neither")


@evaluation.command()
@grouped
def judge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run of llava eval run")],
    *,
    task: Annotated[str | None, typer.Option("--task", help="only this task; default: all that need a judge")] = None,
    verdicts: Annotated[
        Path | None, typer.Option("--verdicts", metavar="FILE", help="take the verdicts of a file instead of asking")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="verdicts on each answer")] = 1,
    options: JudgeOptions,
    cost: CostOptions,
    as_json: AsJson = False,
) -> None:
    """Ask a judge for its verdicts on the answers of a run, and score them. An interrupted command is continued."""
    from llava.eval.judge import Reviews, judged_runs

    cost.check()
    if verdicts and (options.judge_url or options.judge_model):
        raise ConfigError("with --verdicts FILE, no judge is asked; omit --judge-url and --judge-model, or --verdicts")
    found = {one.task.name: Reviews(run=one) for one in judged_runs(run, task)}
    from llava.eval.report import write_report
    from llava.eval.runs import RUN

    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for reviews in found.values():
            stack.enter_context(reviews.locked())
        if verdicts:
            if len(found) > 1:
                raise ConfigError(f"--verdicts is for one task; choose one of {', '.join(found)} with --task")
            next(iter(found.values())).take(verdicts)
        else:
            work = {name: (one, cases) for name, one in found.items() if (cases := one.missing(samples))}
            failed = _ask(work, options, cost) if work else {}
        scores = [one.run.score() for one in found.values()]
        if (run / RUN).exists():
            write_report(run)
    _report(scores, failed, run, as_json)


def _ask(
    work: Mapping[str, tuple["Reviews", Sequence["Case"]]], options: JudgeOptions, cost: CostOptions
) -> dict[str, str]:
    """Asks for all missing verdicts. Returns the errors of those that did not come."""
    from llava.eval import judge

    endpoint = options.endpoint()
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ConfigError("llava eval judge needs httpx: pip install 'llava-native[eval]'") from None
    for reviews, _ in work.values():
        reviews.begin(endpoint)
    _confirm(judge.estimate(work, endpoint), endpoint, cost)
    failed: dict[str, str] = {}
    for name, (reviews, cases) in work.items():
        with progress_bar(f"{name}: verdicts", unit="verdicts") as progress:
            errors = judge.judge(reviews, cases, endpoint, progress=progress)
        failed |= {f"{name}, {case}": error for case, error in errors.items()}
    return failed


def _confirm(estimate: "Estimate", endpoint: "Endpoint", cost: CostOptions) -> None:
    """Prints what the verdicts cost and, on a terminal, asks whether to start."""
    from llava.eval.judge import BYTES_PER_TOKEN

    if endpoint.exposes_key:
        _say(f"the key in {_KEY} is sent without encryption, because --judge-url begins with http:")
    _say(
        f"{counted(estimate.requests, 'verdict')} of {endpoint.model}: about {estimate.input_tokens:,} tokens of "
        f"requests ({BYTES_PER_TOKEN} bytes each), at most {estimate.output_tokens:,} of replies "
        f"({endpoint.max_tokens:,} each), without retries"
    )
    if cost.price_in is not None and cost.price_out is not None:
        price = estimate.price(input=cost.price_in, output=cost.price_out)
        _say(f"cost: at most about {price:,.2f}, at {cost.price_in:g} and {cost.price_out:g} for a million tokens")
    if endpoint.per_minute:
        _say(f"time: at least {estimate.requests / endpoint.per_minute:,.1f} minutes, because of --requests-per-minute")
    if not cost.yes and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm("ask the judge?", abort=True, err=True)


def _say(text: str) -> None:
    print(f"llava: {text}", file=sys.stderr)


def _report(scores: Sequence["Scores"], failed: Mapping[str, str], run: Path, as_json: bool) -> None:
    """Prints scores. Exits with status 1 if a verdict is missing, or a task has no figure."""
    if as_json:
        print(json.dumps({one.task: one.summary() for one in scores}))
    else:
        from rich.console import Console

        from llava.eval.report import table

        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(*map(table, scores))
        print(f"verdicts and scores: {run}")
    for case, error in list(failed.items())[:_SHOWN]:
        _say(f"{case}: no verdict: {error}")
    if failed:
        _say(f"{counted(len(failed), 'verdict')} missing; run the same command again to ask for them")
    unjudged, unanswered = (sum(getattr(one, key) for one in scores) for key in ("unjudged", "unanswered"))
    if unjudged or unanswered:
        _say(f"{counted(unjudged, 'answer')} without a verdict, {counted(unanswered, 'question')} without an answer")
    for one in scores:
        if unparsed := int(one.details.get("unparsed verdicts") or 0):
            left_out = "left out" if one.value is not None else "so there is no figure"
            _say(f"{one.task}: {counted(unparsed, 'verdict')} without two scores in the first line, {left_out}")
    if failed or unjudged or unanswered or any(one.value is None for one in scores):
        raise SystemExit(1)
