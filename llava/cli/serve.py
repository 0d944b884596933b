"""The command serve."""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.answer import load, name_and_folder
from llava.cli.app import app
from llava.cli.options import Adapters, AsJson, Base, EngineFlags, Model, ModelOptions, grouped, model_name
from llava.errors import ConfigError

_GRADIO = (6, 31)  # the oldest one that it works with, and the newest major version
_INSTALL_PAGE = "pip install 'llava-native[ui]'"

if TYPE_CHECKING:
    from llava.serve.plan import Plan


@app.command()
@grouped
def serve(
    *,
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
    host: Annotated[str, typer.Option("--host", help="address to bind; others than this machine's own need a key")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free port")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="default: the hub id, or the folder's last component"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="file with API keys, one per line; or set LLAVA_API_KEY")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="further name of this server in Host headers; repeatable")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option("--allow-origin", help="origin of web pages that may use it; repeatable")
    ] = None,
    allow_media_host: Annotated[
        list[str] | None,
        typer.Option("--allow-media-host", help="host from which pictures are fetched over https; repeatable"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="that compute on a CPU; default: one a core, but for one")
    ] = None,
    ui: Annotated[
        bool | None, typer.Option("--ui/--no-ui", help="the chat page at /; default: if gradio is installed")
    ] = None,
    log_file: Annotated[Path | None, typer.Option("--log-file", help="append logs to a file; default: stderr")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option("--otlp-endpoint", help="send traces there, e.g. http://127.0.0.1:4318/v1/traces")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="log prompts, which may be private")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what serving would need (memory, cache, sequences), and exit")
    ] = False,
    as_json: AsJson = False,
    certificate: Annotated[str | None, typer.Option("--certificate", help="PEM file, to serve https")] = None,
    private_key: Annotated[str | None, typer.Option("--private-key", help="PEM file of the certificate's key")] = None,
    loading: ModelOptions,
    engine: EngineFlags,
) -> None:
    """Serve a model over HTTP, with an API for OpenAI's clients."""
    engine.options()
    try:
        from llava.serve import logs, server
        from llava.serve.access import Access
        from llava.serve.settings import Settings
    except ImportError as error:
        raise ConfigError(f"llava serve needs {error.name}: pip install 'llava-native[serve]'") from None
    settings = Settings(
        name=served_model_name or model_name(model),
        access=Access(
            host=host, keys=_keys(api_key_file), hosts=tuple(allow_host or ()), origins=tuple(allow_origin or ())
        ),
        port=port,
        media_hosts=tuple(allow_media_host or ()),
        otlp_endpoint=otlp_endpoint,
        threads=threads,
        page=not dry_run and _has_page(ui),
        log_prompts=log_prompts,
        certificate=certificate,
        private_key=private_key,
    )
    if as_json and not dry_run:
        raise ConfigError("--json is for --dry-run: add it, or leave --json out; logs are JSON anyway")
    if dry_run:
        plan = _plan(model, settings.name, loading, engine, base=base, adapters=adapter)
        print(json.dumps(plan.to_dict()) if as_json else plan.text())
        return
    logs.set_up(log_file)
    server.run(lambda: load(model, loading, base=base, adapters=adapter, engine=engine), settings)


def _plan(
    model: str | None,
    name: str,
    loading: ModelOptions,
    engine: EngineFlags,
    *,
    base: str | None,
    adapters: list[str] | None,
) -> "Plan":
    from llava.assistant import refuse_quantization
    from llava.config import LoadOptions
    from llava.serve.plan import make_plan

    refuse_quantization(loading.quantize)
    options = LoadOptions(
        base=base,
        vision_tower=loading.vision_tower,
        revision=loading.revision,
        force=loading.force,
        ignore_tensors=tuple(loading.ignore_tensors or ()),
    )
    named = dict(map(name_and_folder, adapters or ()))
    return make_plan(model, name, options, engine.options(), adapters=named, dtype=loading.dtype, device=loading.device)


def _has_page(ui: bool | None) -> bool:
    """Returns whether there is a page. Raises ConfigError if it is wanted, but cannot be."""
    problem = _problem_of_gradio() if ui is not False else None
    if ui and problem:
        raise ConfigError(f"--ui: {problem}: {_INSTALL_PAGE}, or leave --ui out")
    if problem:
        print(f"llava: no chat page, as {problem}: {_INSTALL_PAGE}", file=sys.stderr)
    return ui is not False and not problem


def _problem_of_gradio() -> str | None:
    """Says why gradio cannot show the page, without importing it, which takes seconds."""
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        return "gradio is not installed"
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    return None if (_GRADIO <= (major, minor) < (_GRADIO[0] + 1,)) else f"it does not work with gradio {version}"


def _keys(file: Path | None) -> tuple[str, ...]:
    """Returns the API keys from the environment and a file. They are no arguments, which all users can list."""
    key = os.environ.pop("LLAVA_API_KEY", "")  # the processes that read pictures do not inherit it
    keys = [key] if key else []
    if file is None:
        return tuple(keys)
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read ({getattr(error, 'strerror', error)})") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"--api-key-file {file}: contains no key; write one per line")
    return (*keys, *found)
