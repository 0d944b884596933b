"""The command line: one small function per command. Each imports its implementation, and torch, only when it runs."""

try:
    # importing a module registers its commands; --help lists them in this order
    from llava.cli import (
        answer,
        bench_serve,
        checkpoint,
        compare,
        doctor,
        eval,
        evaluate,
        explain,
        judge,
        merge,
        perplexity,
        score,
        serve,
        train,
        warmup,
        zoo,
    )
    from llava.cli.app import app, guarded, main, progress_bar
except KeyboardInterrupt:  # Ctrl-C right after the start
    raise SystemExit(130) from None

__all__ = [
    "answer",
    "app",
    "bench_serve",
    "checkpoint",
    "compare",
    "doctor",
    "eval",
    "evaluate",
    "explain",
    "guarded",
    "judge",
    "main",
    "merge",
    "perplexity",
    "progress_bar",
    "score",
    "serve",
    "train",
    "warmup",
    "zoo",
]
