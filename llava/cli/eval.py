"""The group of commands for evaluation: eval score, eval perplexity."""

import typer

from llava.cli.app import app

evaluation = typer.Typer(help="Commands for evaluation.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
