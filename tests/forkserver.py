"""A `llava` command that starts in milliseconds: each call is a fork of one process that has already imported torch.

    python -m tests.forkserver SOCKET    serves until stdin closes

A fork has the arguments, environment, current folder, stdin, stdout and stderr of its client and returns its exit code.
It saves the 1.5 s of CPU time that importing torch takes.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch", "safetensors.torch", "sentencepiece", "tokenizers", "PIL.Image", "typer", "rich.console")
MAX_BYTES = 1 << 20  # maximum size of a request
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
request = dict(argv=sys.argv[1:], cwd=os.getcwd(), environ=dict(os.environ))
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(connection.recv(16) or 1))
"""


@contextmanager
def fast_llava() -> Iterator[Path]:
    """Starts a server and yields a folder to put on PATH, which contains its `llava`."""
    with tempfile.TemporaryDirectory(prefix="llava-") as name:
        command = Path(name, "llava")
        address = f"{name}/socket"
        command.write_text(CLIENT.format(python=sys.executable, address=address))
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        argv = [sys.executable, "-m", "tests.forkserver", address]
        with subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdout.readline()  # returns once the server listens
            yield command.parent
            server.stdin.close()


def serve(address: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # forks neither copy nor finalize what was imported: they exit in 0.3 s instead of 1.1 s
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        print("listening", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                return answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Runs one command in a fork and sends its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, files, _, _ = socket.recv_fds(connection, MAX_BYTES, 3)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.send(str(code).encode())
        os._exit(0)
    connection.close()
    for i, file in enumerate(files):
        os.dup2(file, i)
        os.close(file)
    options = json.loads(request)
    os.chdir(options["cwd"])
    os.environ.clear()
    os.environ.update(options["environ"])
    sys.argv = ["llava", *options["argv"]]
    from llava.cli import main

    main(options["argv"])


if __name__ == "__main__":
    serve(sys.argv[1])
