"""The command line: one small function a job. A job's room, and torch with it, is imported only when the job runs."""

# each registers its commands, in the order in which help shows them
from llava.cli import answer, checkpoint, merge, train, zoo
from llava.cli.app import app, guarded, main, progress_bar

__all__ = ["answer", "app", "checkpoint", "guarded", "main", "merge", "progress_bar", "train", "zoo"]
