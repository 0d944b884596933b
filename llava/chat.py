"""The interactive chat in the terminal."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from llava.assistant import Assistant, question_about
from llava.errors import LlavaError, counted
from llava.preprocess.image import read_picture
from llava.tensors.atomic import replacing

HELP = """\
/image PATH adds an image to your next message; /adapter NAME switches to an adapter, or without NAME to the base;
/reset starts over; /save FILE saves the messages; /quit exits. Ctrl-C stops a reply."""


class Chat:
    """A chat session: the messages so far, the images for the next message, and the commands."""

    def __init__(self, assistant: Assistant, options: dict[str, Any]):
        """options: keyword options for `Assistant.generate`."""
        self.assistant = assistant
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.images: list[str] = []
        self._saved: set[Path] = set()  # files written by /save, which it may write again

    def run(self) -> None:
        """Reads and handles lines until /quit or the end of the input."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 (line editing and history for input())

            print(HELP)
        while (line := self._read_line()) is not None:
            if line.strip():
                try:
                    if not self._handle(line.strip()):
                        return
                except LlavaError as error:
                    print(f"llava: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print()

    def _read_line(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except UnicodeDecodeError:
            print("llava: this line is not UTF-8", file=sys.stderr)
            return ""
        except KeyboardInterrupt:  # Ctrl-C clears the line, as in a shell
            print()
            return ""

    def _handle(self, line: str) -> bool:
        """Runs a command or answers a message. Returns False to end the chat."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/reset":
            self.messages, self.images = [], []
            print("started a new conversation")
        elif command == "/image":
            self._add_image(rest)
        elif command == "/adapter":
            self.assistant.adapter(rest or None)
            print(f"switched to {rest or 'the base model'}; available: {', '.join(self.assistant.adapters)}")
        elif command == "/save":
            self._save(Path(rest))
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP)
        else:
            self._answer(line)
        return True

    def _add_image(self, path: str) -> None:
        if not path:
            print("specify a file: /image PATH")
            return
        read_picture(path)
        self.images.append(path)
        print(f"added {path} to your next message")

    def _answer(self, text: str) -> None:
        question = question_about(self.images, text)
        stream = self.assistant.begin([*self.messages, *question], **self.options)
        answer = ""
        try:
            for piece in stream:
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            stream.close()
            print(" [stopped]", end="")
        print()
        if answer.strip():  # the turn is discarded if the reply was stopped before its first word
            self.messages += [*question, {"role": "assistant", "content": answer.strip()}]
            self.images = []

    def _save(self, file: Path) -> None:
        if file == Path():
            print("specify a file: /save FILE")
            return
        if os.path.lexists(file) and file.resolve() not in self._saved and not file.is_dir():
            raise LlavaError(f"{file}: already exists and is not from this chat; choose another file")
        try:
            data = (json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
            with replacing(file) as partial:
                partial.write_bytes(data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LlavaError(
                f"{file}: cannot be written ({reason}); choose another file, or create its folder"
            ) from None
        self._saved.add(file.resolve())
        print(f"wrote {counted(len(self.messages), 'message')} to {file}")
