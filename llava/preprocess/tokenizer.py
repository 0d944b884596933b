"""Text to ids and back, with the two kinds of tokenizer files: SentencePiece (`tokenizer.model`) and `tokenizer.json`.

Ids equal those of the slow Llama tokenizer of transformers 4.37.2, which LLaVA uses. What makes that one special:
added tokens are cut out of the text first, and each stretch between them goes through SentencePiece by itself. With
`legacy` true (also where the flag is absent) every stretch gets a dummy space in front, else only the whole text does.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llava.errors import CheckpointError

SPACE = "▁"  # SentencePiece's sign for a space


class Token(NamedTuple):
    """An id and where it stands in the encoded text, in UTF-8 bytes; start = end: it has no text there."""

    id: int
    start: int
    end: int


class Added(NamedTuple):
    """A token that is cut out of the text before the tokenizer's model sees it."""

    text: str
    id: int
    special: bool  # left out when ids are decoded for reading
    strip_left: bool = False  # swallows white space in front of it
    strip_right: bool = False


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    size: int  # ids, added ones included
    bos_id: int | None  # put in front of a text; None: this tokenizer puts none
    eos_id: int | None
    pad: str | None  # what the files name as the padding token; it may have no id
    special: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text, BOS in front as the tokenizer's files say."""
        ...

    def encode_tokens(self, text: str) -> list[Token]:
        """Tokens of a stretch of text, with their places, without BOS."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; ids that the tokenizer does not know (padded vocabulary rows) are left out."""
        ...

    def id_of(self, text: str) -> int | None:
        """The id of an added token, None if there is none of that text."""
        ...


class SentencePieceTokenizer:
    """The Llama tokenizer over a `tokenizer.model`."""

    def __init__(
        self,
        model: bytes,
        added: Iterable[Added],
        *,
        legacy: bool,
        bos_id: int | None,
        eos_id: int | None,
        pad: str | None = None,
    ):
        """Raises RuntimeError if `model` holds no SentencePiece model."""
        from sentencepiece import SentencePieceProcessor

        if not legacy:
            # `normalizer_spec { add_dummy_prefix: false }` in protobuf's wire form; of two such fields the last wins
            model += b"\x1a\x02\x18\x00"
        self._model = SentencePieceProcessor(model_proto=model)
        self._legacy = legacy
        self._added = {token.text: token for token in added}
        self.added = tuple(self._added.values())
        self._by_id = {token.id: token for token in self.added}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)()")
        self._n_pieces: int = self._model.get_piece_size()
        self.size = max([self._n_pieces, *(id + 1 for id in self._by_id)])
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad = pad
        self.special = frozenset(token.id for token in self._added.values() if token.special)

    def id_of(self, text: str) -> int | None:
        return self._added[text].id if text in self._added else None

    def encode(self, text: str) -> list[int]:
        ids = [token.id for token in self.encode_tokens(text)]
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def encode_tokens(self, text: str) -> list[Token]:
        dummy = bool(text) and not self._legacy
        if dummy:
            text = " " + text.replace(SPACE, " ")
        tokens: list[Token] = []
        for part, place in self._cut(text):
            tokens += self._pieces(part, place) if isinstance(part, str) else [_place(part, place)]
        if dummy and len(tokens) > 1 and tokens[0].end == 1 and tokens[1].id in self.special:
            del tokens[0]  # the dummy space does not stand alone in front of a special token
        return [Token(t.id, max(t.start - dummy, 0), max(t.end - dummy, 0)) for t in tokens]

    def _cut(self, text: str) -> Iterator[tuple[str | Added, int]]:
        """Stretches of text and added tokens in turn, each with its place in bytes."""
        parts = self._cuts.split(text)
        place = 0
        for i, part in enumerate(parts):
            start, place = place, place + len(part.encode())
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

    def _pieces(self, text: str, place: int) -> Iterator[Token]:
        begin = place
        place -= self._legacy  # this model puts a dummy space in front
        for id in self._model.encode(text):
            length = 1 if self._model.is_byte(id) else len(self._model.id_to_piece(id).replace(SPACE, " ").encode())
            yield Token(id, max(place, begin), place + length)
            place += length

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        texts: list[str] = []
        run: list[int] = []
        for id in (*ids, None):
            known = self._by_id.get(id) if id is not None else None
            if id is not None and (id < self._n_pieces or known) and not (known and not known.special):
                if id not in self.special or not skip_special:
                    run.append(id)
            elif id is None or known:  # an added token that is not special stands apart, between spaces
                texts += filter(None, [self._text(run), known.text if known else ""])
                run = []
        return " ".join(texts)

    def _text(self, ids: list[int]) -> str:
        """Text of pieces and special tokens; the first piece's leading space is the dummy one and goes."""
        out, run = "", list[int]()
        after_special = False
        for i, id in enumerate(ids):
            token = self._by_id.get(id)
            if token is None:
                run.append(id)
            else:
                space = " " if self._legacy and i and not after_special else ""
                out, run = out + space + self._decoded(run, first=len(run) == i) + token.text, []
            after_special = token is not None
        return out + self._decoded(run, first=len(run) == len(ids))

    def _decoded(self, ids: list[int], first: bool) -> str:
        text: str = self._model.decode(ids) if ids else ""
        return text.removeprefix(" ") if first else text


def _place(token: Added, start: int) -> Token:
    return Token(token.id, start, start + len(token.text.encode()))


class JsonTokenizer:
    """Any tokenizer of the `tokenizers` library, from its `tokenizer.json`."""

    def __init__(self, file: Path, *, eos: str | None, pad: str | None = None, more: Mapping[str, int] | None = None):
        """`more`: special tokens besides, the next ids. Raises CheckpointError if the file cannot be read."""
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer of the tokenizers library ({error})") from None
        self._model.add_special_tokens(sorted(more or {}, key=(more or {}).__getitem__))
        if lost := [text for text, id in (more or {}).items() if self._model.token_to_id(text) != id]:
            raise CheckpointError(f"{file}: {lost[0]} can not be added: its id would not be the next one")
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

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text).ids
        return ids

    def encode_tokens(self, text: str) -> list[Token]:
        encoded = self._model.encode(text, add_special_tokens=False)
        place = list(accumulate((len(c.encode()) for c in text), initial=0))
        return [Token(id, place[a], place[b]) for id, (a, b) in zip(encoded.ids, encoded.offsets, strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self._model.decode([id for id in ids if id < self.size], skip_special_tokens=skip_special)
        return text


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder brings a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def special_names(folder: Path) -> dict[str, str]:
    """bos_token and the like -> text, as a folder's files name them."""
    return _special_names(_read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json"))


def load_tokenizer(
    folder: Path, *, legacy_strip: bool = False, fast: bool = False, more: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder. `fast`: tokenizer.json first, as transformers' processors take it.

    `legacy_strip`: tokens of added_tokens.json swallow the white space beside them, as transformers up to 4.31 did;
    LLaVA v0 and v1.1 were trained so. `more`: special tokens beyond those of the files, and their ids.
    Raises CheckpointError where the files are missing or broken.
    """
    model, whole = folder / "tokenizer.model", folder / "tokenizer.json"
    settings = _read(folder / "tokenizer_config.json")
    special = _read(folder / "special_tokens_map.json")
    try:
        names = _special_names(settings, special)
        added = _added(settings, _read(folder / "added_tokens.json"), set(names.values()), legacy_strip)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: special or added tokens are not as they should be ({error})") from None
    if whole.is_file() and (fast or not model.is_file()):
        return JsonTokenizer(whole, eos=names["eos_token"], pad=names.get("pad_token"), more=more or {})
    if not model.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model and no tokenizer.json; add the base model's tokenizer")
    added |= {text: Added(text, id, True, legacy_strip, legacy_strip) for text, id in (more or {}).items()}
    try:
        return _sentencepiece(model.read_bytes(), added, names, settings)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{model}: not a SentencePiece model ({str(error).splitlines()[0]})") from None


def _sentencepiece(
    model: bytes, added: dict[str, Added], names: dict[str, str], settings: dict[str, Any]
) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    if not model:
        raise ValueError("the file is empty")
    pieces = SentencePieceProcessor(model_proto=model)
    if not pieces.get_piece_size():
        raise ValueError("it has no pieces")
    for text in names.values():
        id = pieces.piece_to_id(text)
        if text not in added and pieces.id_to_piece(id) == text:
            added[text] = Added(text, id, special=True)
    bos, eos = added.get(names["bos_token"]), added.get(names["eos_token"])
    return SentencePieceTokenizer(
        model,
        added.values(),
        legacy=settings.get("legacy") is not False,
        bos_id=bos.id if bos and settings.get("add_bos_token", True) else None,
        eos_id=eos.id if eos else None,
        pad=names.get("pad_token"),
    )


def _special_names(settings: dict[str, Any], special: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like -> text. Empty strings, as in the v0 files, count as absent."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for source in (special, settings):
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = source.get(key)
            if text := value.get("content") if isinstance(value, dict) else value:
                names[key] = _checked(text, key)
    return names


def _added(settings: dict[str, Any], plain: dict[str, int], special: set[str], strip: bool) -> dict[str, Added]:
    """Added tokens of added_tokens.json (untyped) and tokenizer_config.json (with flags), by their text."""
    added = {text: Added(text, _id(id, text), text in special, strip, strip) for text, id in plain.items() if text}
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise ValueError("added_tokens_decoder is no table of tokens")
    for id, token in decoder.items():
        text = _checked(token["content"], f"token {id}")
        flags = (True, True) if strip and text in plain else (token.get("lstrip", False), token.get("rstrip", False))
        added[text] = Added(text, _id(id, text), token.get("special", False) or text in special, *flags)
    by_id: dict[int, str] = {}
    for text, token in added.items():
        if (other := by_id.setdefault(token.id, text)) != text:
            raise ValueError(f"{other!r} and {text!r} have the same id {token.id}")
    return added


def _checked(text: Any, what: str) -> str:
    """Text that can be in a prompt. Raises ValueError, UnicodeEncodeError among them."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {text!r:.60}, expected a text")
    text.encode()
    return text


def _id(value: Any, text: str) -> int:
    """A token's id as the files have it, a number or (as a key) its digits. Raises ValueError."""
    _checked(text, "a token")
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < _MOST_IDS:
        raise ValueError(f"{text!r:.60} has the id {value!r:.60}")
    return int(value)


_MOST_IDS = 2**31


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: can not be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return values
