"""Trains a small Llama and its SentencePiece tokenizer on texts about the world: `python -m examples.tiny.language`.

B rows   S tokens per row   V vocabulary size

Dialogues are rendered in the template that is used later, and concatenated. Every token is a target.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn

from examples.tiny.pretrain import (
    Budget,
    Compile,
    Decay,
    Device,
    Minutes,
    Out,
    Rate,
    Seed,
    Size,
    Steps,
    autocast,
    fit,
    initialise,
    logger,
    save,
)
from llava.checkpoint.load import resolve_device
from llava.config import IMAGE_PLACEHOLDER, DecoderConfig
from llava.errors import ConfigError, LlavaError
from llava.formats.llama import RULES as HF_LLAMA
from llava.model.decoder import Decoder
from llava.preprocess.conversation import Turn, render
from llava.preprocess.templates import TEMPLATES
from llava.tensors.atomic import new_folder
from llava.tensors.writer import write_json

Ids = npt.NDArray[np.int16]
TEMPLATE = TEMPLATES["vicuna_v1"]
BOS, EOS = 1, 2
HELD_BACK = 50  # one text in this many is held out for evaluation
LLAVA_TINY = DecoderConfig(
    kind="llama", n_layers=5, dim=256, n_heads=4, n_kv_heads=4, head_dim=64, mlp_dim=640, vocab_size=1024,
    max_seq=1024, eps=1e-5, tied=True,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run."""

    texts: Sequence[Path]
    out: Path
    minutes: float | None = 1.5
    steps: int | None = None  # instead of minutes
    batch: int = 32  # rows
    row: int = 1024  # tokens
    lr: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "auto"
    compiled: bool = True  # only on a GPU
    config: DecoderConfig = LLAVA_TINY


def read_texts(files: Sequence[Path]) -> list[str]:
    """Reads texts from LLaVA's JSON: plain strings, samples with `text`, or `conversations`, which are rendered.

    <image> marks are removed. Raises ConfigError.
    """
    texts = []
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: does not exist; expected a JSON list of texts and conversations")
        for sample in json.loads(file.read_text(encoding="utf-8")):
            if isinstance(sample, str) or "text" in sample:
                texts.append(sample if isinstance(sample, str) else sample["text"])
            else:
                texts.append(_dialogue(sample["conversations"]))
    if len(texts) < 2 * HELD_BACK:
        raise ConfigError(f"{', '.join(map(str, files))}: {len(texts)} texts; expected {2 * HELD_BACK} or more")
    return texts


def _dialogue(said: Sequence[dict[str, str]]) -> str:
    texts = [turn["value"].replace(IMAGE_PLACEHOLDER, "").strip() for turn in said]
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return "".join(span.text for span in render(TEMPLATE, turns))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece model like Llama's: BPE without normalization, byte fallback, and <unk> <s> </s> as 0 1 2."""
    step = max(1, len(texts) // 20_000)
    lines = dict.fromkeys(line for text in texts[::step] for part in text.split("</s>") for line in part.split("\n"))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=100_000,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


def encode(texts: Sequence[str], model: bytes) -> list[Ids]:
    """Encodes each text as `load_tokenizer` does with `legacy` false, with </s> at the end of each turn."""
    # the appended `normalizer_spec { add_dummy_prefix: false }` wins, so a text gets only the leading space below
    pieces = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
    parts = [part for text in texts for part in f" {text}".split("</s>")]
    ids = iter(pieces.encode(parts, num_threads=2))
    found = []
    for text in texts:
        own = [BOS]
        for _ in range(text.count("</s>") + 1):
            own += [*next(ids), EOS]
        found.append(np.array(own[:-1] if own[-2:] == [EOS, EOS] else own, np.int16))
    return found


class Rows:
    """Concatenates the texts, in a new order in each epoch, and cuts them into rows."""

    def __init__(self, texts: list[Ids], options: Options, device: torch.device):
        self.texts, self.options, self.device = texts, options, device
        self.random = np.random.default_rng(options.seed)
        self.batches = self._endless()

    def _endless(self) -> Iterator[Tensor]:
        shape, left = (self.options.batch, self.options.row + 1), np.empty(0, np.int16)
        while True:
            order = self.random.permutation(len(self.texts))
            stream = np.concatenate([left, *(self.texts[i] for i in order)])
            n = stream.size // (shape[0] * shape[1])
            whole = stream[: n * shape[0] * shape[1]].reshape(n, *shape)
            left = stream[whole.size :]
            yield from torch.from_numpy(whole).to(self.device)

    def next(self) -> Tensor:
        """The next batch of rows, int64 [B, S + 1]."""
        return next(self.batches).long()


class Language(nn.Module):
    """The decoder and its loss."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        initialise(self.decoder, config.n_layers)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of the S next tokens in nats: ids [B, S + 1] -> scalar."""
        x = self.decoder(self.decoder.lookup(ids[:, :-1]))
        return F.cross_entropy(self.decoder.logits(x).flatten(0, 1), ids[:, 1:].flatten())


def train(options: Options) -> dict[str, float]:
    """Trains tokenizer and model, writes their folder, and returns the final metrics. Raises LlavaError."""
    device = resolve_device(options.device)
    budget = Budget(None if options.steps else options.minutes, options.steps)
    with new_folder(options.out, 64_000_000) as folder:
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        texts = read_texts(options.texts)
        model = train_tokenizer(texts, options.config.vocab_size)
        encoded = encode(texts, model)
        language = Language(options.config).to(device)
        last = _run(options, budget, language, encoded, device)
        write(folder, language, model)
    return last


def _run(
    options: Options,
    budget: Budget,
    language: Language,
    encoded: list[Ids],
    device: torch.device,
) -> dict[str, float]:
    rows = Rows([text for i, text in enumerate(encoded) if i % HELD_BACK], options, device)
    unseen = Rows(encoded[::HELD_BACK], options, device).next()
    loss = torch.compile(language, dynamic=False) if options.compiled and device.type == "cuda" else language
    last: dict[str, float] = {}

    def forward() -> Tensor:
        ids = rows.next()
        with autocast(device):
            return loss(ids)

    @torch.no_grad()
    def report() -> dict[str, float]:
        with autocast(device):
            last["unseen"] = round(float(language(unseen)), 4)
        return last

    log = logger(options.out.with_name(f"{options.out.name}.jsonl"))
    rates: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    fit(forward, language.parameters(), budget, report, log, **rates, samples=options.batch * options.row)
    return last


def write(folder: Path, language: Language, model: bytes) -> None:
    """Writes a Llama folder in Hugging Face format, in float16."""
    config = language.config
    state = language.decoder.state_dict()
    ours = {f"decoder.{name}": tensor for name, tensor in state.items() if not (config.tied and name == "head.weight")}
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    save(folder, ours, HF_LLAMA, values)
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq,
        "padding_side": "right",
        "sp_model_kwargs": {},
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})


def main(
    texts: Annotated[list[Path], typer.Option(help="JSON in LLaVA's format; repeatable")],
    out: Out,
    minutes: Minutes = 1.5,
    steps: Steps = None,
    batch: Annotated[int, typer.Option(help="rows per step")] = Options.batch,
    row: Annotated[int, typer.Option(help="tokens per row")] = Options.row,
    lr: Rate = Options.lr,
    weight_decay: Decay = Options.weight_decay,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = True,
    dim: Size = LLAVA_TINY.dim,
    layers: Size = LLAVA_TINY.n_layers,
    heads: Size = LLAVA_TINY.n_heads,
    mlp: Size = LLAVA_TINY.mlp_dim,
    vocab: Annotated[int, typer.Option(help="vocabulary size")] = LLAVA_TINY.vocab_size,
    max_seq: Annotated[int, typer.Option(help="context length in tokens")] = LLAVA_TINY.max_seq,
) -> None:
    """Train a tokenizer and a small Llama, and write them as a Llama folder."""
    try:
        config = DecoderConfig(
            kind="llama", n_layers=layers, dim=dim, n_heads=heads, n_kv_heads=heads, head_dim=dim // heads,
            mlp_dim=mlp, vocab_size=vocab, max_seq=max_seq, eps=LLAVA_TINY.eps, tied=True,
        )  # fmt: skip
        options = Options(
            texts=texts, out=out, minutes=minutes, steps=steps, batch=batch, row=row, lr=lr, weight_decay=weight_decay,
            seed=seed, device=device, compiled=compile, config=config,
        )  # fmt: skip
        train(options)
    except LlavaError as error:
        typer.echo(f"language: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
