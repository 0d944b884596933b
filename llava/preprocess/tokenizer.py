"""Converts text to ids and back, either with SentencePiece plus added tokens or with the `tokenizers` library.

With SentencePiece, the ids match those of LLaVA's tokenizer, the slow Llama tokenizer of transformers 4.37.2: the text
is first split at added tokens, and SentencePiece encodes each stretch between them separately. If `legacy` is true or
not set in tokenizer_config.json, a dummy space is prepended to every stretch; otherwise, only to the text as a whole.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from llava.errors import CheckpointError

SPACE = "▁"  # SentencePiece's symbol for a space
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class Token(NamedTuple):
    """A token id and its range in the encoded text, in UTF-8 bytes; start equals end for a token without text."""

    id: int
    start: int
    end: int


class AddedToken(NamedTuple):
    """A token that is split off from the text before the tokenizer's model runs."""

    text: str
    id: int
    special: bool  # omitted from the decoded text if `skip_special` is set
    strip_left: bool = False  # strips whitespace before the token
    strip_right: bool = False  # strips whitespace after the token


class Tokenizer(Protocol):
    """The tokenizer interface that the rest of the project uses."""

    size: int  # number of ids, including added tokens
    bos_id: int | None  # prepended by `encode`; None if this tokenizer does not add BOS
    eos_id: int | None
    pad: str | None  # padding token specified in the tokenizer files; may be missing from the vocabulary
    special: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a complete text, preceded by BOS if `bos_id` is set."""
        ...

    def encode_tokens(self, text: str) -> list[Token]:
        """Returns the tokens of a stretch of text with their ranges, without BOS."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Decodes ids to text. Skips unknown ids, such as the ids of padding rows in the embedding table."""
        ...

    def id_of(self, text: str) -> int | None:
        """Returns the id of the added token `text`, or None if `text` is not an added token."""
        ...

    def piece(self, id: int) -> bytes:
        """Returns the bytes that a token stands for, with its leading space; b"" for an unknown id."""
        ...

    @property
    def added_texts(self) -> Iterable[str]:
        """The texts of the added tokens."""
        ...

    def with_renamed(self, names: Mapping[str, str]) -> "Tokenizer":
        """Returns a tokenizer that reads added tokens by new names {text: new text}, and the old ones as ordinary text.

        All ids stay the same. Raises CheckpointError if this is not possible.
        """
        ...


class SentencePieceTokenizer:
    """The Llama tokenizer, loaded from a `tokenizer.model` file."""

    def __init__(
        self,
        model: bytes,
        added: Iterable[AddedToken],
        *,
        legacy: bool,
        bos_id: int | None,
        eos_id: int | None,
        pad: str | None = None,
    ):
        """model: contents of `tokenizer.model`. Raises RuntimeError if the contents are not a SentencePiece model."""
        from sentencepiece import SentencePieceProcessor

        if not legacy:
            # Append `normalizer_spec { add_dummy_prefix: false }`; in protobuf, the last value of a field takes effect.
            model += b"\x1a\x02\x18\x00"
        self._model = SentencePieceProcessor(model_proto=model)
        self._legacy = legacy
        self._set_added(added)
        self._n_pieces: int = self._model.get_piece_size()
        self.size = max([self._n_pieces, *(id + 1 for id in self._by_id)])
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad = pad
        self.special = frozenset(token.id for token in self._added.values() if token.special)

    def _set_added(self, added: Iterable[AddedToken]) -> None:
        self._added = {token.text: token for token in added}
        self.added = tuple(self._added.values())
        self._by_id = {token.id: token for token in self.added}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)()")

    def id_of(self, text: str) -> int | None:
        return self._added[text].id if text in self._added else None

    def piece(self, id: int) -> bytes:
        if id in self._by_id:
            return self._by_id[id].text.encode()
        if not 0 <= id < self._n_pieces:
            return b""
        return _piece_bytes(self._model.id_to_piece(id), self._model.is_byte(id))

    @property
    def added_texts(self) -> Iterable[str]:
        return self._added

    def with_renamed(self, names: Mapping[str, str]) -> "SentencePieceTokenizer":
        renamed = copy(self)
        renamed._set_added(one._replace(text=names.get(one.text, one.text)) for one in self.added)
        return renamed

    def encode(self, text: str) -> list[int]:
        ids = [token.id for token in self.encode_tokens(text)]
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def encode_tokens(self, text: str) -> list[Token]:
        dummy = bool(text) and not self._legacy
        if dummy:
            text = " " + text.replace(SPACE, " ")
        tokens: list[Token] = []
        for part, start in self._split(text):
            tokens += self._encode_part(part, start) if isinstance(part, str) else [_located(part, start)]
        if dummy and len(tokens) > 1 and tokens[0].end == 1 and tokens[1].id in self.special:
            del tokens[0]  # drop a lone dummy space before a special token
        return [Token(t.id, max(t.start - dummy, 0), max(t.end - dummy, 0)) for t in tokens]

    def _split(self, text: str) -> Iterator[tuple[str | AddedToken, int]]:
        """Yields stretches of text and the added tokens between them, each with its start offset in bytes."""
        parts = self._pattern.split(text)
        offset = 0
        for i, part in enumerate(parts):
            start, offset = offset, offset + len(part.encode())
            if i % 2:
                yield self._added[part], start
                continue
            if i > 0 and self._added[parts[i - 1]].strip_right:
                stripped = part.lstrip()
                start, part = start + len(part.encode()) - len(stripped.encode()), stripped
            if i + 1 < len(parts) and self._added[parts[i + 1]].strip_left:
                part = part.rstrip()
            if part:
                yield part, start

    def _encode_part(self, text: str, start: int) -> Iterator[Token]:
        offset = start - self._legacy  # in legacy mode, the model prepends a dummy space
        for id in self._model.encode(text):
            length = 1 if self._model.is_byte(id) else len(self._model.id_to_piece(id).replace(SPACE, " ").encode())
            yield Token(id, max(offset, start), offset + length)
            offset += length

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        texts: list[str] = []
        run: list[int] = []
        for id in (*ids, None):
            known = self._by_id.get(id) if id is not None else None
            if id is not None and (id < self._n_pieces or known) and not (known and not known.special):
                if id not in self.special or not skip_special:
                    run.append(id)
            elif id is None or known:  # non-special added tokens are surrounded by spaces
                texts += filter(None, [self._decode_run(run), known.text if known else ""])
                run = []
        return " ".join(texts)

    def _decode_run(self, ids: list[int]) -> str:
        """Decodes pieces and special tokens. Omits the dummy space before the first piece."""
        out, run = "", list[int]()
        after_special = False
        for i, id in enumerate(ids):
            token = self._by_id.get(id)
            if token is None:
                run.append(id)
            else:
                space = " " if self._legacy and i and not after_special else ""
                out, run = out + space + self._decode_pieces(run, first=len(run) == i) + token.text, []
            after_special = token is not None
        return out + self._decode_pieces(run, first=len(run) == len(ids))

    def _decode_pieces(self, ids: list[int], first: bool) -> str:
        text: str = self._model.decode(ids) if ids else ""
        return text.removeprefix(" ") if first else text


def _located(token: AddedToken, start: int) -> Token:
    return Token(token.id, start, start + len(token.text.encode()))


class JsonTokenizer:
    """A tokenizer based on the `tokenizers` library, loaded from a `tokenizer.json` file."""

    def __init__(self, file: Path, *, eos: str | None, pad: str | None = None, more: Iterable[AddedToken] = ()):
        """more: tokens to add unless `file` has them. Raises CheckpointError if they do not get their ids.

        Truncation and padding, which the file may contain from the last call before it was saved, are ignored, as in
        transformers.
        """
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain `Exception`
            raise CheckpointError(f"{file}: cannot be loaded by the tokenizers library ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        for token in sorted(more, key=lambda token: token.id):
            if self._model.token_to_id(token.text) is None:
                flags = {"lstrip": token.strip_left, "rstrip": token.strip_right, "special": token.special}
                self._model.add_tokens([tokenizers.AddedToken(token.text, normalized=False, **flags)])
            if self._model.token_to_id(token.text) != token.id:
                raise CheckpointError(
                    f"{file}: token {token.text} cannot be added with id {token.id}, because it has another id in this "
                    "file or another id is the next free one; put the tokenizer.json that belongs to the model here"
                )
        added = self._model.get_added_tokens_decoder()
        self.size = self._model.get_vocab_size(with_added_tokens=True)
        self.special = frozenset(id for id, token in added.items() if token.special)
        self._ids = {token.content: id for id, token in added.items()}
        start = self._model.encode("").ids
        self.bos_id = start[0] if start else None
        self.eos_id = self._model.token_to_id(eos) if eos else None
        self.pad = pad

    def id_of(self, text: str) -> int | None:
        return self._ids.get(text)

    def piece(self, id: int) -> bytes:
        text = self._model.id_to_token(id)
        if text is None or self._ids.get(text) == id:
            return (text or "").encode()
        if self._byte_of:
            return bytes(self._byte_of[c] for c in text)
        return _piece_bytes(text, bool(_BYTE_PIECE.fullmatch(text)))

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte for each character of a piece in byte-level BPE; {} for other tokenizers."""
        decoder = json.loads(self._model.to_str())["decoder"] or {}
        kinds = {one["type"] for one in [decoder, *decoder.get("decoders", ())] if one}
        return _bytes_by_character() if "ByteLevel" in kinds else {}

    @property
    def added_texts(self) -> Iterable[str]:
        return self._ids

    def with_renamed(self, names: Mapping[str, str]) -> "JsonTokenizer":
        import tokenizers

        settings = json.loads(self._model.to_str())
        for token in settings["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = settings["model"]["vocab"]  # added tokens are often in it too
        if isinstance(vocabulary, dict):
            settings["model"]["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
        else:
            settings["model"]["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if isinstance(unknown := settings["model"].get("unk_token"), str):
            settings["model"]["unk_token"] = names.get(unknown, unknown)
        renamed = copy(self)
        renamed._model = tokenizers.Tokenizer.from_str(json.dumps(settings))
        renamed._ids = {token.content: id for id, token in renamed._model.get_added_tokens_decoder().items()}
        if renamed._ids != {names.get(content, content): id for content, id in self._ids.items()}:
            texts = ", ".join(names)
            raise CheckpointError(f"this tokenizer cannot encode {texts} as ordinary text: remove it from the prompt")
        return renamed

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text).ids
        return ids

    def encode_tokens(self, text: str) -> list[Token]:
        encoded = self._model.encode(text, add_special_tokens=False)
        offsets = list(accumulate((len(c.encode()) for c in text), initial=0))  # offset of each character, in bytes
        return [Token(id, offsets[a], offsets[b]) for id, (a, b) in zip(encoded.ids, encoded.offsets, strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self._model.decode([id for id in ids if id < self.size], skip_special_tokens=skip_special)
        return text


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


@cache
def _bytes_by_character() -> dict[str, int]:
    """Returns the byte that each character of a byte-level piece stands for (GPT-2's table).

    Printable characters of Latin-1 stand for themselves, and those from U+0100 on for the other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
