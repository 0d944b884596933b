"""What a folder is and which template it was made for: from its files, tensors and config, never from its name.

Each answer comes with the line that decided it. A new family is one rule here and one table in `keymap.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llava.checkpoint import published
from llava.checkpoint.files import PROJECTOR_FILE, Weights
from llava.config import DecoderConfig, ProjectorConfig
from llava.preprocess.tokenizer import Tokenizer

Kind = Literal["native", "merged", "llama", "delta", "lora", "projector", "llava-hf", "mpt", "meta", "clip", "unknown"]
FORMAT_KEY, NATIVE_FORMAT = "llava_format", "native-1"
TEMPLATE_KEY, MODE_KEY = "llava_template", "llava_image_mode"  # of published layouts that this package wrote

_ALREADY_ADDED = 0.1  # |mean| of a final norm's weight below this: the tensor is a difference


class Facts(NamedTuple):
    """What can be seen of a folder."""

    folder: Path  # or a file that holds a projector alone
    settings: Mapping[str, Any]  # config.json, {} if there is none
    weights: Weights


class Finding(NamedTuple):
    """What a folder is and how that was seen."""

    kind: Kind
    evidence: list[str]


def detect(facts: Facts) -> Finding:
    """The first rule that fits decides."""
    for kind, rule in _RULES:
        if evidence := rule(facts):
            return Finding(kind, evidence)
    return Finding("unknown", ["no config.json and no weights of a known layout"])


def _native(facts: Facts) -> list[str]:
    value = facts.settings.get(FORMAT_KEY)
    return [f"config.json: {FORMAT_KEY} = {value}"] if value else []


def _lora(facts: Facts) -> list[str]:
    return ["adapter_config.json is there: a LoRA, to be added to a base"] * _has(facts, "adapter_config.json")


def _projector(facts: Facts) -> list[str]:
    if facts.folder.is_file():
        return ["a single file that holds mm_projector.*"]
    alone = _has(facts, PROJECTOR_FILE) and not facts.weights
    return ["mm_projector.bin is there and no weights of a language model"] * alone


def _meta(facts: Facts) -> list[str]:
    n = len({entry.file for name, entry in facts.weights.entries.items() if ".pth/" in name})
    return [f"{n} shards named consolidated.NN.pth, of Meta's own format"] * (n > 0)


def _llava_hf(facts: Facts) -> list[str]:
    names = [str(name) for name in facts.settings.get("architectures") or []]
    names = [name for name in names if name.endswith("ForConditionalGeneration")]
    if names:
        return [f"config.json: architectures = {names[0]}"]
    return ["config.json: has a text_config of its own"] * ("text_config" in facts.settings and not _is_clip(facts))


def _is_clip(facts: Facts) -> bool:
    return str(facts.settings.get("model_type", "")).startswith("clip")


def _clip(facts: Facts) -> list[str]:
    return [f"config.json: model_type = {facts.settings.get('model_type')}"] * _is_clip(facts)


def _mpt(facts: Facts) -> list[str]:
    if facts.settings.get("model_type") == "llava_mpt":
        return ["config.json: model_type = llava_mpt"]
    return ["tensors are named transformer.*"] * any(name.startswith("transformer.") for name in facts.weights)


def _delta(facts: Facts) -> list[str]:
    if "model.norm.weight" not in facts.weights:
        return []
    mean = facts.weights["model.norm.weight"].float().mean().item()
    return [f"model.norm.weight has mean {mean:.4f}: a difference to a base"] * (abs(mean) < _ALREADY_ADDED)


def _merged(facts: Facts) -> list[str]:
    evidence = [f"tensor {name}" for name in facts.weights if name.startswith("model.mm_projector.")][:1]
    if tower := facts.settings.get("mm_vision_tower"):
        evidence.append(f"config.json: mm_vision_tower = {tower}")
    return evidence


def _llama(facts: Facts) -> list[str]:
    plain = "model.embed_tokens.weight" in facts.weights
    return ["tensors model.layers.*, no projector, no mm_vision_tower: a plain Llama"] * plain


def _has(facts: Facts, name: str) -> bool:
    return (facts.folder / name).is_file()


_RULES: tuple[tuple[Kind, Callable[[Facts], list[str]]], ...] = (
    ("native", _native),
    ("lora", _lora),
    ("projector", _projector),
    ("clip", _clip),
    ("meta", _meta),
    ("llava-hf", _llava_hf),
    ("mpt", _mpt),
    ("delta", _delta),
    ("merged", _merged),
    ("llama", _llama),
)


def is_mistral(decoder: DecoderConfig) -> bool:
    """Whether a Llama has the sizes that Mistral alone has in the zoo; Yi's theta is another."""
    return decoder.kind == "llama" and decoder.n_kv_heads == 8 and decoder.rope_theta == 1e6


class Choice(NamedTuple):
    """The conversation template of a checkpoint (None: it has none) and the line that decided."""

    template: str | None
    because: str


def choose_template(
    kind: Kind,
    settings: Mapping[str, Any],
    decoder: DecoderConfig | None,
    projector: ProjectorConfig | None,
    tokenizer: Tokenizer | None,
) -> Choice:
    """The first that fits. Repository ids inside files break ties; the folder's own name is never looked at."""
    if kind == "native":
        return Choice(settings.get("template"), "recorded in config.json")
    if named := settings.get(TEMPLATE_KEY):
        return Choice(str(named), "recorded in config.json")
    if settings.get("model_type") == "llava_mpt":
        return Choice("mpt", "model_type is llava_mpt")
    if decoder and decoder.kind == "mpt" and settings.get("mm_vision_tower"):
        return Choice("mpt", "an MPT decoder beside LLaVA's keys")
    if decoder and is_mistral(decoder):
        return Choice("mistral_instruct", "8 key/value heads and rope theta 1e6: a Mistral decoder")
    if tokenizer and tokenizer.eos_id is not None and tokenizer.id_of("<|im_end|>") == tokenizer.eos_id:
        return Choice("chatml_direct", "the tokenizer's eos is <|im_end|>")
    if kind == "projector":
        return Choice("plain", "a projector alone: trained on captions")
    if not settings.get("mm_vision_tower"):
        return Choice(None, "no mm_vision_tower: a plain language model, name a template yourself")
    if tokenizer and (tokenizer.pad == "[PAD]" or tokenizer.id_of("[PAD]") in tokenizer.special):
        return Choice("llava_v0", "[PAD] is among the tokenizer's special tokens")
    if "LlamaForCausalLM" in (settings.get("architectures") or []):
        return Choice("llava_v0", "architectures is LlamaForCausalLM beside LLaVA's keys")
    if decoder and projector and projector.depth == 1 and decoder.max_seq == 4096:
        return Choice("llava_llama_2", "a linear projector and 4096 positions")
    if (base := settings.get("_name_or_path")) and published.is_llama_2_chat(str(base)):
        return Choice("llava_llama_2", f"config.json records {base} as the base")
    return Choice("llava_v1", "none of the other rules fits")
