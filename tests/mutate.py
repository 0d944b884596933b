"""Ways to corrupt a checkpoint folder. Each draws from a random generator, so seed and number reproduce a case.

A mutation receives a world: a folder with `model`, and `clip` and `base` if the layout needs them. It returns a line
that describes the change, and whether the answer of a model that still loads may change.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MARKER = "executed"  # the file that code from a checkpoint would create
WEIGHTS = (".safetensors", ".bin")
OPTIONAL = ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "preprocessor_config",
            "processor_config", "adapter_config", "tokenizer")  # files without which an answer changes  # fmt: skip


class Done(NamedTuple):
    """The outcome of a mutation."""

    what: str
    changes: bool  # whether the answer may change


class Unfit(Exception):
    """The mutation does not apply to this world."""


Mutation = Callable[[Random, Path, list[Path]], Done]  # generator, world, worlds of other layouts


def files_of(world: Path, *suffixes: str) -> list[Path]:
    """The files of a world in a fixed order. Raises Unfit if there are none."""
    found = sorted(path for path in world.rglob("*") if path.is_file() and path.name.endswith(suffixes or ("",)))
    if not found:
        raise Unfit
    return found


def is_optional(path: Path) -> bool:
    return path.suffix == ".json" and path.stem in OPTIONAL


# ------------------------------------------------------------------------------------------------ whole files


def rename(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    to = rng.choice(
        [path.name + ".bak", path.stem, "model.safetensors", "pytorch_model.bin", "config.json", "ü\n.json"]
    )
    path.rename(path.with_name(to))
    return Done(f"{path.name} renamed {to!r}", is_optional(path) or path.with_name(to).name in ("config.json",))


def remove(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    path.unlink()
    return Done(f"{path.name} removed", is_optional(path))


def remove_folder(rng: Random, world: Path, others: list[Path]) -> Done:
    folder = rng.choice(sorted(path for path in world.iterdir() if path.is_dir()))
    shutil.rmtree(folder)
    if rng.random() < 0.5:
        folder.mkdir()
    return Done(f"{folder.name} emptied", False)


def empty(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    path.write_bytes(b"")
    return Done(f"{path.name} emptied", False)


def truncate(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    n = rng.randrange(path.stat().st_size + 1)
    os.truncate(path, n)
    return Done(f"{path.name} cut at {n}", path.name == "tokenizer.model")


def lengthen(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    with path.open("ab") as out:
        out.write(rng.choice([rng.randbytes(rng.randrange(1, 5000)), bytes(1000), b"}\n", path.read_bytes()]))
    return Done(f"{path.name} lengthened", path.name == "tokenizer.model")


def flip(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    return Done(f"bytes of {path.name}", True)


def flip_ends(rng: Random, world: Path, others: list[Path]) -> Done:
    """Flips bits at the start or end of a file, where formats keep lengths, offsets and directories."""
    path = rng.choice(files_of(world, *WEIGHTS))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 2, 8])):
        offset = rng.randrange(min(400, len(data)))
        data[rng.choice([offset, -1 - offset])] = rng.choice([0, 1, 255, 128, rng.randrange(256)])
    path.write_bytes(data)
    return Done(f"head or tail of {path.name}", True)


def noise(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world))
    n = path.stat().st_size
    path.write_bytes(rng.choice([rng.randbytes(n), bytes(n), b"\xff" * n, b"PK\x03\x04" + rng.randbytes(n)]))
    return Done(f"noise for {path.name}", False)


def other_thing(rng: Random, world: Path, others: list[Path]) -> Done:
    """Replaces a file with a folder, a circular or dangling link, a pipe without a writer, or a device."""
    path = rng.choice(files_of(world))
    kind = rng.choice(["folder", "loop", "nowhere", "pipe", "zero"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path, "nowhere": "no-such-file", "zero": "/dev/zero"}[kind])
    return Done(f"{path.name} is a {kind}", is_optional(path))


def exchange(rng: Random, world: Path, others: list[Path]) -> Done:
    """Swaps two files of a world."""
    one, two = rng.sample(files_of(world), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return Done(f"{one.relative_to(world)} and {two.relative_to(world)} exchanged", True)


def foreign_file(rng: Random, world: Path, others: list[Path]) -> Done:
    """Copies a file of another layout into the world, over an existing file or as a new one."""
    given = rng.choice(files_of(rng.choice(others)))
    name = rng.choice([given.name, rng.choice(files_of(world)).name])
    shutil.copyfile(given, world / "model" / name)
    return Done(f"{given.parent.name}/{given.name} of another layout as {name}", True)


def encoding(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world, ".json"))
    text = path.read_text()
    data = {
        "utf-16": text.encode("utf-16"),
        "utf-8-sig": text.encode("utf-8-sig"),
        "latin-1": text.replace('": "', '": "\xe9\xff', 1).encode("latin-1"),
        "nul": text.replace('"', '"\0', 1).encode(),
    }
    name = rng.choice(sorted(data))
    path.write_bytes(data[name])
    return Done(f"{path.name} in {name}", is_optional(path) or name in ("latin-1", "nul"))


# ------------------------------------------------------------------------------------------------ JSON

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, -(2**63), 2**31, 2**40, 2**63, 10**6, 10**9, 10**30, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "64", "text", "a\nb", "\ud800", "\0", "../..", "/", "/dev/zero",
    "owner/name", "model", "x" * 5000, [], [1, 2], [None], [[10**6, 10**6]], [[0, 0]], [[-56, 56]], [[57, 55]],
    "[[1,", "[" * 3000, {}, {"a": 1}, {"content": 5}, {"type": "linear"}, {"type": "linear", "factor": 1e300},
    {"rope_type": "llama3", "factor": float("nan")}, {"height": -1}, {"shortest_edge": 2**40}, [0.0, 0.0, 0.0],
    [float("nan")] * 3, {"-5": {"content": "a"}}, {"99999999999": {"content": "b"}},
)  # fmt: skip
KEYS = (
    "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "rope_theta", "attention_bias", "mlp_bias",
    "mm_patch_merge_type", "image_grid_pinpoints", "image_aspect_ratio", "text_config", "vision_config", "llava_format",
    "llava_template", "attn_config", "tie_word_embeddings", "max_sequence_length", "architectures", "model_type",
    "mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end", "use_dora", "rank_pattern",
    "added_tokens_decoder",
    "legacy", "add_bos_token", "eos_token", "pad_token", "eos_token_id", "crop_size", "size", "image_mean", "image_std",
    "expansion_ratio", "quantization_config", "vision_feature_layer", "torch_dtype", "llava_vocab_size", "lora_alpha",
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all parts of a JSON value; of long lists and token tables only some."""
    here = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return here + [part for key, inner in list(items)[:60] for part in _paths(inner, (*path, key))]


def _edit(rng: Random, world: Path, change: Callable[[Any, Any], str]) -> Done:
    """Changes one part of one JSON file, most often config.json."""
    found = files_of(world, ".json")
    file = rng.choice([*found, *(file for file in found if file.name == "config.json")])
    values = json.loads(file.read_text())
    path = rng.choice(_paths(values))
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    what = change(holder, path[-1])
    file.write_text(json.dumps(values))
    return Done(f"{file.relative_to(world)}: {what}"[:300], True)


def json_value(rng: Random, world: Path, others: list[Path]) -> Done:
    def change(holder: Any, key: Any) -> str:
        holder[key] = rng.choice(NASTY)
        return f"{key} = {holder[key]!r}"

    return _edit(rng, world, change)


def json_number(rng: Random, world: Path, others: list[Path]) -> Done:
    """Replaces a number with another one, of the same or a different type, or flips a boolean."""

    def change(holder: Any, key: Any) -> str:
        old = holder[key]
        if isinstance(old, bool):
            holder[key] = not old
        elif isinstance(old, int | float):
            holder[key] = rng.choice([-old, old + 1, old * 2, old / 2, old // 2, str(old), [old], old * 10**6, 1 / 3])
        else:
            holder[key] = rng.choice([1, 10**9, str(old) + "x", [old], {"v": old}])
        return f"{key}: {old!r:.60} -> {holder[key]!r:.60}"

    return _edit(rng, world, change)


def json_without(rng: Random, world: Path, others: list[Path]) -> Done:
    def change(holder: Any, key: Any) -> str:
        del holder[key]
        return f"without {key}"

    return _edit(rng, world, change)


def json_with(rng: Random, world: Path, others: list[Path]) -> Done:
    path = rng.choice(files_of(world, ".json"))
    values, key, value = json.loads(path.read_text()), rng.choice(KEYS), rng.choice(NASTY)
    path.write_text(json.dumps({**values, key: value}))
    return Done(f"{path.relative_to(world)}: {key} = {value!r}"[:300], True)


def json_huge(rng: Random, world: Path, others: list[Path]) -> Done:
    """Sets a size to a value that no file can match."""
    path = rng.choice([file for file in files_of(world, ".json") if file.name == "config.json"])
    values = json.loads(path.read_text())
    holders = [values, *(value for value in values.values() if isinstance(value, dict))]
    holder = rng.choice(holders)
    keys = [key for key, value in holder.items() if isinstance(value, int) and not isinstance(value, bool)]
    if not keys:
        raise Unfit
    for key in rng.sample(keys, rng.randrange(1, len(keys) + 1)):
        holder[key] = rng.choice([10**9, 10**6, 2**40, 2**62, 10**30, 10**5, 1000, 10**300])
    path.write_text(json.dumps(values))
    return Done(f"{path.relative_to(world)}: huge sizes", True)


def json_form(rng: Random, world: Path, others: list[Path]) -> Done:
    """Replaces a JSON file with JSON of another structure, or with text that is not JSON."""
    path = rng.choice(files_of(world, ".json"))
    text = path.read_text()
    deep = rng.choice([200, 5000, 200_000])
    forms = {
        "a list": f"[{text}]",
        "a number": "5",
        "null": "null",
        "an empty object": "{}",
        "deep lists": text.replace("{", '{"deep": ' + "[" * deep + "]" * deep + ", ", 1),
        "deep objects": '{"a":' * deep + "1" + "}" * deep,
        "twice each key": text.rstrip().rstrip("}") + ", " + text.lstrip().lstrip("{"),
        "a number of many digits": text.replace("{", '{"n": ' + "9" * 5000 + ", ", 1),
        "comments": "// so\n" + text,
    }
    name = rng.choice(sorted(forms))
    path.write_text(forms[name])
    return Done(f"{path.relative_to(world)}: {name}", is_optional(path) or name in ("a list", "an empty object"))


def tokens(rng: Random, world: Path, others: list[Path]) -> Done:
    """Puts impossible ids and texts into added_tokens.json or added_tokens_decoder."""
    ids = [-1, -(2**70), 0, 2, 511, 512, 513, 600, 10**5, 10**9, 2**40, "12", "x", None, [], 1.5, True, "٣"]
    texts = ["<a>", "", " ", "<s>", "\ud800", "a" * 3000, "<image>", "\n", "▁", "é", "<im_start>"]
    table = {rng.choice(texts): rng.choice(ids) for _ in range(rng.choice([1, 3, 6]))}
    folder = rng.choice([path.parent for path in files_of(world, "tokenizer_config.json", "config.json")])
    if rng.random() < 0.5:
        (folder / "added_tokens.json").write_text(json.dumps(table))
    else:
        file = folder / "tokenizer_config.json"
        values = json.loads(file.read_text()) if file.is_file() else {}
        flags = {"lstrip": rng.choice([True, "x", 5]), "special": rng.choice([True, False, None, "x"])}
        values["added_tokens_decoder"] = {str(id): {"content": text, **flags} for text, id in table.items()}
        file.write_text(json.dumps(values))
    return Done(f"{folder.name}: added tokens {table}"[:300], True)


# ------------------------------------------------------------------------------------------------ weights


def header(rng: Random, world: Path, others: list[Path]) -> Done:
    """Changes the header of a safetensors file."""
    path = rng.choice(files_of(world, ".safetensors"))
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    table, values = json.loads(data[8 : 8 + n]), data[8 + n :]
    name = rng.choice([key for key in table if key != "__metadata__"])
    entry, kind = (
        table[name],
        rng.choice(["shape", "dtype", "offsets", "overlap", "name", "length", "extra", "metadata"]),
    )
    if kind == "shape":
        entry["shape"] = rng.choice([[10**9, 64], [2**40, 2**40], [], [0], [-1, 64], entry["shape"][::-1], [64.5], "x"])
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F32", "F64", "I64", "BOOL", "F8_E4M3", "BF16", "X", 5, None])
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice([[0, 10**15], [-8, 0], [8, 0], [0], [0, 2**64 - 1], "x"])
    elif kind == "overlap":
        entry["data_offsets"] = table[rng.choice([key for key in table if key != "__metadata__"])]["data_offsets"]
    elif kind == "name":
        table[rng.choice(["", "a\nb", "x" * 10**5, "decoder.blocks.999999999999.attn.out.weight", "__metadata__"])] = (
            table.pop(name)
        )
    elif kind == "extra":
        table["model.layers.10000000.mlp.up_proj.weight"] = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    elif kind == "metadata":
        table["__metadata__"] = rng.choice([{"format": 5}, [], {"format": "x" * 10**5}])
    text = json.dumps(table).encode()
    length = rng.choice([0, 1, 2**63, 2**64 - 1, len(text) + 5, 10**8]) if kind == "length" else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + values)
    return Done(f"{path.name}: {kind} of {name}", kind in ("dtype", "overlap", "shape"))


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def code(rng: Random, world: Path, others: list[Path]) -> Done:
    """Adds a pickle that would run code: plain, in torch's legacy format or in its zip."""
    path = rng.choice(files_of(world, ".bin"))
    harm = Touch(world.absolute().parent / MARKER)
    kind = rng.choice(["bare", "legacy", "zip", "beside"])
    if kind == "bare":
        path.write_bytes(pickle.dumps(harm, protocol=rng.choice([0, 2, 4])))
    else:
        tensors = torch.load(path) if kind == "beside" else {}
        torch.save({**tensors, "a": harm}, path, _use_new_zipfile_serialization=kind != "legacy")
    return Done(f"code in {path.name}: {kind}", False)


def _read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def _write(path: Path, tensors: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "no values": lambda t: t[:0],
    "one value": lambda t: t.flatten()[0],
    "one row": lambda t: t[:1],
    "a row too many": lambda t: torch.cat([t, t[:1]]),
    "flat": lambda t: t.flatten(),
    "another dimension": lambda t: t[None],
    "transposed": lambda t: t.mT if t.dim() == 2 else t[:-1],
    "not a number": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: torch.cat([t[:-1], torch.full_like(t[-1:], -float("inf"))]),
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
}


def tensor(rng: Random, world: Path, others: list[Path]) -> Done:
    """Changes shape, values or name of one tensor, or removes it."""
    path = rng.choice(files_of(world, *WEIGHTS))
    tensors = _read(path)
    name = rng.choice(sorted(tensors))
    kind = rng.choice([*SHAPES, "removed", "renamed"])
    value = tensors.pop(name)
    if kind in SHAPES:
        tensors[name] = SHAPES[kind](value)
    elif kind == "renamed":
        tensors[rng.choice([name + ".bias", "x\ny", "model.layers.7.mlp.up_proj.weight", "lm_head.weight"])] = value
    _write(path, tensors)
    return Done(f"{path.name}: {name} {kind}", kind in ("renamed", "transposed", "a row too many"))


def tensor_type(rng: Random, world: Path, others: list[Path]) -> Done:
    """Casts some or all tensors to another dtype."""
    path, kind = rng.choice(files_of(world, *WEIGHTS)), rng.choice(sorted(KINDS))
    tensors = _read(path)
    some = sorted(tensors) if rng.random() < 0.3 else [rng.choice(sorted(tensors))]
    _write(path, {name: KINDS[kind](value) if name in some else value for name, value in tensors.items()})
    return Done(f"{path.name}: {some[0]} as {kind}", True)


def odd_entry(rng: Random, world: Path, others: list[Path]) -> Done:
    """Adds entries to a .bin that are not plain tensors, or claim more values than the file holds."""
    path = rng.choice(files_of(world, ".bin"))
    tensors: dict[Any, Any] = dict(_read(path))
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    odd = {
        "stretched": value.flatten()[:1].expand(10**6, 10**6),
        "repeated": value[:1].expand(2 * len(value), *value.shape[1:]) if value.dim() else value,
        "complex": value.to(torch.complex64),
        "sparse": value.to_sparse(),
        "on no device": value.to("meta"),
        "a list": [1, 2],
        "text": "x",
        "nested": {"a": value},
        "a parameter": torch.nn.Parameter(value, requires_grad=value.is_floating_point()),
        "strided": torch.stack([value, value], -1)[..., 0],
    }
    kind = rng.choice(sorted([*odd, "numbered", "list of tensors"]))
    if kind == "numbered":
        tensors[5] = value
    else:
        tensors[name] = odd.get(kind, value)
    torch.save(list(tensors.values()) if kind == "list of tensors" else tensors, path)
    return Done(f"{path.name}: {name} {kind}", False)


def legacy(rng: Random, world: Path, others: list[Path]) -> Done:
    """Rewrites a .bin in torch's format from before 1.6, complete or truncated."""
    path = rng.choice(files_of(world, ".bin"))
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    if (kind := rng.choice(["whole", "cut", "flipped"])) == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "flipped":
        for _ in range(4):
            data[rng.randrange(min(3000, len(data)))] = rng.randrange(256)
    path.write_bytes(data)
    return Done(f"{path.name} in the form from before 1.6, {kind}", kind == "flipped")


def index(rng: Random, world: Path, others: list[Path]) -> Done:
    """Changes the files that the index assigns to tensors."""
    path = rng.choice(files_of(world, ".index.json"))
    values = json.loads(path.read_text())
    table = values["weight_map"]
    name = rng.choice(sorted(table))
    kind = rng.choice(["elsewhere", "all elsewhere", "of no tensor", "without", "no map", "itself"])
    away = ["../base/model.safetensors", "/dev/zero", "nowhere.bin", "..", "", 5, None, ["x"], "x\n.bin", "clip/x.bin"]
    if kind == "elsewhere":
        table[name] = rng.choice([*away, *table.values()])
    elif kind == "all elsewhere":
        values["weight_map"] = dict.fromkeys(table, rng.choice(away))
    elif kind == "of no tensor":
        table[rng.choice(["a\nb", "", "model.layers.99.x"])] = table[name]
    elif kind == "without":
        del table[name]
    elif kind == "no map":
        values["weight_map"] = rng.choice([{}, [], None, 5, [name]])
    else:
        table[name] = path.name
    path.write_text(json.dumps(values))
    return Done(f"{path.name}: {name} {kind}", False)


def shuffled_zip(rng: Random, world: Path, others: list[Path]) -> Done:
    """Shortens or lengthens records of a .bin without updating its directory."""
    path = rng.choice(files_of(world, ".bin"))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, rng.randrange(100, len(data)))
    at = at if at >= 0 else data.find(b"PK\x01\x02")
    if at < 0:
        raise Unfit
    field = rng.choice([10, 20, 24, 28, 30, 42])  # compression, sizes, lengths of names, offset
    struct.pack_into("<I" if field > 10 else "<H", data, at + field, rng.choice([0, 1, 8, 12, 65535]))
    path.write_bytes(data)
    return Done(f"{path.name}: directory entry, field {field}", True)


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        rename, remove, remove_folder, empty, truncate, lengthen, flip, flip_ends, noise, other_thing, exchange,
        foreign_file, encoding, json_value, json_number, json_without, json_with, json_huge, json_form, tokens, header,
        code, tensor, tensor_type, odd_entry, legacy, index, shuffled_zip,
    )
}  # fmt: skip
WEIGHED = [*MUTATIONS, "json_value", "json_value", "json_number", "json_with", "json_huge"]


def mutate(rng: Random, kind: str, world: Path, others: list[Path]) -> tuple[list[str], Done]:
    """Applies a mutation of one kind, sometimes a second of any kind. If a kind does not apply, another one is tried.

    Returns the kinds and the outcome.
    """
    kinds: list[str] = []
    done = Done("", False)
    wanted = [kind, *([rng.choice(WEIGHED)] if rng.random() < 0.15 else [])]
    while wanted:
        name = wanted.pop(0)
        try:
            one = MUTATIONS[name](rng, world, others)
        except Exception:  # Unfit, or a file that the first mutation has already corrupted
            if not kinds:
                wanted.append(rng.choice(WEIGHED))
            continue
        kinds.append(name)
        done = Done("; ".join(filter(None, [done.what, one.what])), done.changes or one.changes)
    return kinds, done
