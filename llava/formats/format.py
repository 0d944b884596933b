"""The interface that every on-disk format implements, and the records that its methods accept and return.

To add a format, write one module with a subclass of `Format` and add one line to `formats/__init__.py`. Class
attributes declare the capabilities of the format; tests/formats/test_contract.py verifies each of them.
"""

import re
from abc import ABC, abstractmethod
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
RECORDED = "recorded in config.json"  # the reason for a template that `TEMPLATE_KEY` names
TEMPLATE_KEY, IMAGE_MODE_KEY = "llava_template", "llava_image_mode"  # our additional keys in config.json


class CheckpointFiles(NamedTuple):
    """The parts of a checkpoint that are available before any weights are read."""

    path: Path  # a checkpoint folder, or a projector stored as a single file
    config: Mapping[str, Any]  # config.json; {} if there is none
    weights: Weights

    @property
    def config_file(self) -> Path:
        """The path to show in error messages about `config`."""
        return self.path if self.path.is_file() else self.path / "config.json"


class Detection(NamedTuple):
    """The format of a checkpoint and the evidence for it."""

    format: str
    evidence: list[str]


class TemplateChoice(NamedTuple):
    """The name of a checkpoint's conversation template (None if it has none) and the reason for the choice."""

    template: str | None
    because: str

    @property
    def recorded(self) -> bool:
        """Whether config.json records the template, so that it is not inferred."""
        return self.because == RECORDED


class Resolved(NamedTuple):
    """A checkpoint's tensors, keyed by our names."""

    tensors: dict[str, LazyTensor]
    dropped: tuple[str, ...] = ()  # on-disk names of tensors that the format defines but LLaVA does not need
    unknown: Mapping[str, Path] = {}  # on-disk names that no rule matches -> their files
    start_end: bool = False  # the tensors include trained embeddings of <im_start> and <im_end>


class ReadConfig(NamedTuple):
    """A model's config and its sources."""

    config: LlavaConfig
    # config.json with the keys of published LLaVA checkpoints or, for the native format, with our own keys
    source_config: Mapping[str, Any]
    source: Path  # path of the checkpoint that `source_config` comes from
    tower_folder: Path | None = None  # folder with the tower's config; None if there is no tower or no such folder


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A resolved checkpoint: the model's config and the source of each tensor."""

    path: Path
    format: str
    evidence: list[str]
    template: TemplateChoice
    config: LlavaConfig
    source_config: Mapping[str, Any]  # config.json that `config` was read from; see `ReadConfig`
    tensors: dict[str, LazyTensor]
    missing: tuple[str, ...]  # expected tensors that no file contains, under our names
    unused: dict[str, LazyTensor]  # known tensors that this model does not need, under our names
    unused_names: tuple[str, ...]  # on-disk names of tensors that this model does not need, including `unused`
    tokenizer: Tokenizer
    tokenizer_folder: Path  # folder with the tokenizer files; the base's folder if the checkpoint has none
    new_tokens: Mapping[str, int]  # tokens that the tokenizer files do not contain -> ids
    vision_tower: str | None  # folder or hub id, from config.json or the caller
    tower_folder: Path | None  # folder with the tower's config and, unless `tower_inside`, its weights
    tower_inside: bool  # whether the checkpoint itself contains the tower's weights
    tower_beside: bool = False  # whether the tower is in the checkpoint's own subfolder, which must be copied with it

    @property
    def unused_tower(self) -> dict[str, LazyTensor]:
        """Tower tensors after the selected layer: not needed here, but expected by other readers."""
        return {n: t for n, t in self.unused.items() if n.startswith("vision.") and self.config.vision}

    def read_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (our name, tensor) pairs one at a time. Tensors are memory-mapped unless they have to be computed."""
        for name, tensor in self.tensors.items():
            yield name, tensor.read()


class TensorKeys(NamedTuple):
    """The keys of config.json that determine the tensors whose names (ours) match a pattern, for error messages."""

    pattern: str
    existence: str  # keys that determine whether the model has the tensor
    shape: str  # keys that determine its shape


class WriteJob(NamedTuple):
    """Everything needed to write a checkpoint into a folder."""

    checkpoint: Checkpoint  # as returned by `Format.prepare`
    source: Checkpoint  # the checkpoint before `Format.prepare`
    outputs: Sequence[OutputTensor]
    config: Mapping[str, Any]  # as returned by `Format.write_config`
    folder: Path  # temporary folder to write into
    progress: Progress


class Format(ABC):
    """Base class of the on-disk formats, for both reading and writing."""

    name: ClassVar[str]
    reads: ClassVar[bool] = True  # `llava.load` can open it
    writes: ClassVar[bool] = False  # `llava convert --to NAME` can write it
    needs_base: ClassVar[bool] = False  # contains only part of a model: LoRA, projector, delta
    exact: ClassVar[bool] = True  # tensors keep their dtypes and values when written and read back
    holds_vision: ClassVar[bool] = True  # False if the format stores only the language model
    image_mode: ClassVar[ImageMode | None] = None  # the only image mode that can be represented; None if both
    fast_tokenizer: ClassVar[bool] = False  # prefers tokenizer.json to tokenizer.model
    tensor_keys: ClassVar[tuple[TensorKeys, ...]] = ()  # the first match counts

    # ------------------------------------------------------------------------------------------------- reading

    @abstractmethod
    def rules(self, config: LlavaConfig | None = None) -> tuple[Rule, ...]:
        """Returns the key table for writing a model with this config, or the table for reading if `config` is None."""

    def detect(self, files: CheckpointFiles) -> list[str]:
        """Returns the evidence that `files` have this format, strongest first; [] if there is none."""
        return []

    def published_config(self, files: CheckpointFiles) -> Mapping[str, Any]:
        """Returns config.json with the keys of published LLaVA checkpoints. Raises CheckpointError or ConfigError."""
        return files.config

    def resolve(self, files: CheckpointFiles, base: Checkpoint | None, tokenizer: Tokenizer) -> Resolved:
        """Returns the tensors under our names, combined with `base` if the format needs one. Raises CheckpointError."""
        return resolved_by(plan(files.weights, self.rules()), files.weights)

    def read_config(
        self, files: CheckpointFiles, tensors: Mapping[str, LazyTensor], base: Checkpoint | None, options: LoadOptions
    ) -> ReadConfig:
        """Reads the model's config. Every format with `reads` overrides this method.

        tensors: as returned by `resolve`. Raises CheckpointError or ConfigError.
        """
        raise NotImplementedError

    def tokenizer_folder(self, files: CheckpointFiles) -> Path:
        return files.path

    def new_tokens(self, files: CheckpointFiles, first_id: int) -> dict[str, int]:
        """Returns the ids, starting at `first_id`, of tokens whose embeddings the checkpoint adds to its base."""
        return {}

    def keys_of(self, ours: str) -> TensorKeys:
        """Returns the keys of config.json that determine one of our tensors."""
        matching = (keys for keys in self.tensor_keys if re.match(keys.pattern, ours))
        return next(matching, TensorKeys("", "sizes", "sizes"))

    # ------------------------------------------------------------------------------------------------- writing

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """Converts dtypes and vocabulary rows for this format. Raises CheckpointError if that is impossible."""
        return checkpoint

    def outputs(self, checkpoint: Checkpoint) -> list[OutputTensor]:
        """Returns the tensors to write. Raises CheckpointError if the format cannot represent the model."""
        return to_disk(checkpoint.tensors, checkpoint.config, self.rules(checkpoint.config))

    def write_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Returns config.json, or {} if the format has no such file.

        Raises ConfigError or CheckpointError if it cannot represent the model.
        """
        return {}

    def write_extra(self, source: Checkpoint, folder: Path) -> None:
        """Writes all files except the weights and config.json. `source`: the checkpoint before `prepare`."""
        copy_tokenizer(source.tokenizer_folder, folder, source.new_tokens)

    def extra_bytes(self, source: Checkpoint) -> int:
        """Returns the size of the weights that `write_extra` writes."""
        return 0

    def write(self, job: WriteJob) -> None:
        """Writes all files of a checkpoint into `job.folder`."""
        write_shards(job.folder, job.outputs, job.progress)
        write_json(job.folder / "config.json", job.config)
        self.write_extra(job.source, job.folder)

    def read_back(self, folder: Path, checkpoint: Checkpoint) -> Checkpoint | None:
        """Reopens the written `checkpoint` if `open_checkpoint` cannot read this format; otherwise returns None."""
        return None

    def remarks(self, source: Checkpoint) -> list[str]:
        """Returns notes for conversion.md, addressed to users of the written files."""
        return []


def resolved_by(planned: Plan, weights: Weights) -> Resolved:
    """Returns the tensors of a plan as lazy tensors that read from `weights`."""
    tensors = {ours: from_files(weights, names) for ours, names in planned.tensors.items()}
    return Resolved(tensors, planned.dropped, {name: weights.headers[name].file for name in planned.unknown})


def to_disk(tensors: Mapping[str, LazyTensor], config: LlavaConfig, rules: Sequence[Rule]) -> list[OutputTensor]:
    """Returns the tensors to write, under the names of a key table. Concatenated q, k and v are split."""

    def split_rows(ours: str, n_rows: int, n_parts: int) -> Sequence[int]:
        return config.decoder.qkv_rows if ours.startswith("decoder.") else [n_rows // n_parts] * n_parts

    return named_on_disk(tensors, rules, split_rows)


def shapes_of(tensors: Mapping[str, LazyTensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def section(config: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    """Returns the object at `key`, or {} if it is absent, null or empty. Raises ConfigError for other values."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r:.60}; expected an object")
    return value


def one_of(value: Any, known: Sequence[str], what: str) -> Any:
    """Returns `value` if it is one of `known`. Raises ConfigError otherwise."""
    if value not in known:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    return value


def require_llama(checkpoint: Checkpoint, format: str) -> None:
    """Raises CheckpointError if the language model is not a Llama model."""
    if (kind := checkpoint.config.decoder.kind) != "llama":
        raise CheckpointError(f"{checkpoint.path}: has a language model of kind {kind}; {format} supports only Llama")
