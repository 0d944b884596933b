"""The command line: one small function per command. Each imports its implementation, and torch, only when it runs."""

# importing a module registers its commands; --help lists them in this order
from llava.cli import answer, checkpoint, merge, train, zoo
from llava.cli.app import app, guarded, main, progress_bar

__all__ = ["answer", "app", "checkpoint", "guarded", "main", "merge", "progress_bar", "train", "zoo"]
