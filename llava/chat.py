"""A conversation in the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from llava.assistant import Assistant
from llava.errors import LlavaError
from llava.preprocess.image import open_picture

HELP = """\
/image PATH puts a picture before your next message; /adapter NAME switches, without a name to the base alone;
/reset; /save FILE; /quit. Ctrl-C ends an answer."""


class Chat:
    """Turns so far, pictures waiting for the next one, and the commands that change them."""

    def __init__(self, assistant: Assistant, options: dict[str, Any]):
        self.assistant = assistant
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[str] = []

    def run(self) -> None:
        """Reads lines until /quit or the end of input."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 (line editing and history for input())

            print(HELP)
        while (line := self._read()) is not None:
            if line.strip():
                try:
                    if not self._take(line.strip()):
                        return
                except LlavaError as error:
                    print(f"llava: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print()

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except UnicodeDecodeError:
            print("llava: that line is not UTF-8", file=sys.stderr)
            return ""
        except KeyboardInterrupt:  # an empty line, as in a shell
            print()
            return ""

    def _take(self, line: str) -> bool:
        """Does what a line says; False to end."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/reset":
            self.messages, self.pictures = [], []
            print("a new conversation")
        elif command == "/image":
            open_picture(rest)
            self.pictures.append(rest)
            print(f"{rest} stands before your next message")
        elif command == "/adapter":
            self.assistant.adapter(rest or None)
            print(f"{rest or 'the base alone'} answers from now on; there are {', '.join(self.assistant.adapters)}")
        elif command == "/save":
            self._save(Path(rest))
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP)
        else:
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        parts = [{"type": "image", "image": picture} for picture in self.pictures]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        stream = self.assistant.begin([*self.messages, asked], **self.options)
        said = ""
        try:
            for piece in stream:
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            print(" [ended]", end="")
        print()
        if said.strip():  # an answer that was ended before its first word leaves no turn behind
            self.messages += [asked, {"role": "assistant", "content": said.strip()}]
            self.pictures = []

    def _save(self, file: Path) -> None:
        if file == Path():
            print("give a file: /save FILE")
            return
        try:
            data = (json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
            partial = file.with_name(f".{file.name}.partial")
            partial.write_bytes(data)
            partial.replace(file)
        except (OSError, ValueError) as error:
            raise LlavaError(f"{file}: can not be written ({error})") from None
        print(f"{len(self.messages)} messages in {file}")
