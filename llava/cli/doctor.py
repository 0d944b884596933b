"""The command doctor."""

import json

from llava.cli.app import app
from llava.cli.kernel_cache import chosen_folders, folders, private_folder, why_not_private
from llava.cli.options import AsJson


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, caches and extras, which kernels run, and why the others do not."""
    from llava import doctor as job

    problem = why_not_private(private_folder())
    unused = set(folders()) - set(chosen_folders()) if problem else set()
    report = job.examine(folders(), {name: f"{private_folder()} {problem}" for name in unused})
    if as_json:
        print(json.dumps(job.to_dict(report), ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for section, findings in report.items():
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(width=20, overflow="fold")
        table.add_column(overflow="fold")
        for one in findings:
            table.add_row(one.name, one.text)
        console.print(f"{section}:", style="bold")
        console.print(table)
        console.print()
