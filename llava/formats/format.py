"""The seam that every on-disk format implements, and the records that formats read and write.

A new format is one file with a subclass of `Format`, and one line in `formats/__init__.py`. Class attributes state what
it can do; the contract test in tests/formats/test_contract.py checks each statement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from llava.config import ImageMode, LlavaConfig, LoadOptions
from llava.errors import CheckpointError, ConfigError
from llava.formats.tokenizer import copy_tokenizer
from llava.preprocess.tokenizer import Tokenizer
from llava.tensors.files import Weights
from llava.tensors.keymap import Plan, Rule, from_files, plan
from llava.tensors.lazy import LazyTensor
from llava.tensors.writer import OutputTensor, Progress, named_on_disk, write_json, write_shards

Shapes = Mapping[str, tuple[int, ...]]  # our tensor names -> shapes
TEMPLATE_KEY, IMAGE_MODE_KEY = "llava_template", "llava_image_mode"  # our keys in config.json files of other formats


class CheckpointFiles(NamedTuple):
    """What can be seen of a checkpoint before any weight is read."""

    path: Path  # a folder, or the single file of a bare projector
    config: Mapping[str, Any]  # config.json; {} if there is none
    weights: Weights

    @property
    def config_file(self) -> Path:
        """For error messages about `config`."""
        return self.path if self.path.is_file() else self.path / "config.json"


class Detection(NamedTuple):
    """The format of a checkpoint and the evidence for it."""

    format: str
    evidence: list[str]


class TemplateChoice(NamedTuple):
    """The conversation template of a checkpoint (None: it has none) and why it was chosen."""

    template: str | None
    because: str


class Resolved(NamedTuple):
    """The tensors of a checkpoint under our names."""

    tensors: dict[str, LazyTensor]
    dropped: tuple[str, ...] = ()  # names on disk that are known and not needed
    unknown: Mapping[str, Path] = {}  # names on disk that no rule matches, and their files
    start_end: bool = False  # embeddings of <im_start> and <im_end> came with them


class ReadConfig(NamedTuple):
    """A model's config, and what it was read from."""

    config: LlavaConfig
    source_config: Mapping[str, Any]  # config.json with the keys of published LLaVA checkpoints (native: our keys)
    source: Path  # the checkpoint that it describes
    tower_folder: Path | None = None  # None: there is no tower, or its published sizes were used


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A resolved checkpoint: the model's config, and where each of our tensors comes from."""

    path: Path
    format: str
    evidence: list[str]
    template: TemplateChoice
    config: LlavaConfig
    source_config: Mapping[str, Any]  # what `config` was read from: see ReadConfig
    tensors: dict[str, LazyTensor]
    missing: tuple[str, ...]  # our names that no file holds
    unused: dict[str, LazyTensor]  # known tensors that this model does not need, under our names
    unused_names: tuple[str, ...]  # names on disk that this model does not need, those of `unused` included
    tokenizer: Tokenizer
    tokenizer_folder: Path  # of its files; the base's for checkpoints without a tokenizer
    new_tokens: Mapping[str, int]  # tokens that the tokenizer has in addition to those files
    vision_tower: str | None  # as named in config.json or by the caller
    tower_folder: Path | None  # where the tower's config, and its weights unless `tower_inside`, were read
    tower_inside: bool  # the checkpoint holds the tower's weights itself

    @property
    def unused_tower(self) -> dict[str, LazyTensor]:
        """Tower tensors after the selected layer: not needed here, but expected by other readers."""
        return {n: t for n, t in self.unused.items() if n.startswith("vision.") and self.config.vision}

    def read_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our names and tensors, one at a time, memory-mapped unless they have to be computed."""
        for name, tensor in self.tensors.items():
            yield name, tensor.read()


class WriteJob(NamedTuple):
    """A checkpoint on its way into a folder."""

    checkpoint: Checkpoint  # as prepared for the format
    source: Checkpoint  # as opened
    outputs: Sequence[OutputTensor]
    folder: Path  # to write into
    target: Path  # the name that the folder will get
    progress: Progress


class Format:
    """One on-disk format: reading and writing in one place."""

    name: ClassVar[str]
    reads: ClassVar[bool] = True  # `llava.load` opens it
    writes: ClassVar[bool] = False  # `llava convert --to NAME` writes it
    needs_base: ClassVar[bool] = False  # only a part of a model: LoRA, projector, delta
    exact: ClassVar[bool] = True  # written and read again, tensors have the same types and values
    holds_vision: ClassVar[bool] = True  # False: the language model only
    image_mode: ClassVar[ImageMode | None] = None  # the only one that the format can express; None: either
    fast_tokenizer: ClassVar[bool] = False  # prefers tokenizer.json to tokenizer.model

    # ------------------------------------------------------------------------------------------------- reading

    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        """The key table. `config`: the model to write, where one format spells models differently."""
        raise NotImplementedError

    def detect(self, files: CheckpointFiles) -> list[str]:
        """Evidence that this is the format of `files`, the deciding line first; [] if it is not."""
        return []

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        """config.json with the keys that published LLaVA checkpoints use. Raises CheckpointError, ConfigError."""
        return files.config

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        """Where each of our tensors comes from. `tokenizer`: the result's. Raises CheckpointError."""
        return resolved_by(plan(files.weights, self.rules()), files.weights)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        """The model's config. `tensors`: as resolved. Raises CheckpointError, ConfigError."""
        raise NotImplementedError

    def tokenizer_folder(self, files: CheckpointFiles) -> Path:
        return files.path

    def new_tokens(self, files: CheckpointFiles, first_id: int) -> dict[str, int]:
        """Tokens whose embeddings the checkpoint holds, for a tokenizer that ends before `first_id`."""
        return {}

    # ------------------------------------------------------------------------------------------------- writing

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same model as this format stores it: types, vocabulary rows. Raises CheckpointError if it cannot."""
        return checkpoint

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """The tensors to write. Raises CheckpointError if the format has no place for the model."""
        return to_disk(checkpoint.tensors, checkpoint.config, self.rules(checkpoint.config))

    def write_config(self, checkpoint: Checkpoint, target: Path) -> dict[str, Any]:
        """config.json for a folder that will be `target`."""
        raise NotImplementedError

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        """Writes the files next to weights and config. `source`: as opened, before `prepare`."""
        copy_tokenizer(source.tokenizer_folder, folder, source.new_tokens)

    def write(self, job: WriteJob) -> None:
        """Writes all files of a checkpoint into `job.folder`."""
        write_shards(job.folder, job.outputs, job.progress)
        write_json(job.folder / "config.json", self.write_config(job.checkpoint, job.target))
        self.write_extra(job.source, job.folder)

    def read_back(self, folder: Path, checkpoint: Checkpoint) -> Checkpoint | None:
        """What was written of `checkpoint`, for formats that `open_checkpoint` does not read; None for the others."""
        return None

    def remarks(self, source: Checkpoint) -> list[str]:
        """Sentences for conversion.md that a reader of the files should know."""
        return []


def resolved_by(planned: Plan, weights: Weights) -> Resolved:
    """The tensors of a plan, read from these files."""
    tensors = {ours: from_files(weights, names) for ours, names in planned.tensors.items()}
    return Resolved(tensors, planned.dropped, {name: weights.headers[name].file for name in planned.unknown})


def to_disk(tensors: Mapping[str, LazyTensor], config: LlavaConfig, rules: Sequence[Rule]) -> list[OutputTensor]:
    """Tensors under the names of a key table; q, k and v are split again."""

    def split_rows(ours: str, n_rows: int, n_parts: int) -> Sequence[int]:
        return config.decoder.qkv_rows if ours.startswith("decoder.") else [n_rows // n_parts] * n_parts

    return named_on_disk(tensors, rules, split_rows)


def shapes_of(tensors: Mapping[str, LazyTensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def section(config: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    """An object inside a config; absent, null and empty are the same. Raises ConfigError."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r:.60}; expected an object")
    return value


def one_of(value: Any, known: Sequence[str], what: str) -> Any:
    """`value` if it is one of `known`. Raises ConfigError."""
    if value not in known:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    return value


def require_llama(checkpoint: Checkpoint, format: str) -> None:
    """Raises CheckpointError if the language model is not a Llama."""
    if (kind := checkpoint.config.decoder.kind) != "llama":
        raise CheckpointError(f"{checkpoint.path}: its language model is of kind {kind}; {format} holds a Llama only")
