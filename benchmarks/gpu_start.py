"""The case `start` of `gpu.py`: seconds from the start of a process to the first token of a reply about a picture.

The weights are in the page cache, and both programs have run once before. Ours is `llava ask`; the peer is this file:

    python benchmarks/gpu_start.py FOLDER PICTURE DEVICE DTYPE
"""

import shutil
import sys
from pathlib import Path

import random_checkpoint
from gpu_setup import Measured, Setup, Skipped
from PIL import Image
from processes import LLAVA
from result import OURS, PEER
from start import QUESTION, SIDE, first_byte

from llava.convert.convert import convert


class Starts:
    """Writes a random checkpoint in the llava-hf format, which both programs read."""

    def __init__(self, setup: Setup):
        self.setup = setup
        folder, need = Path(setup.folder), 2.1 * random_checkpoint.n_bytes(setup.size, setup.layers)
        if (free := shutil.disk_usage(folder).free) < need:
            raise Skipped(f"{folder.parent} has {free / 1e9:.0f} GB free, of {need / 1e9:.0f}; give another --folder")
        source = random_checkpoint.write_llava(folder, setup.size, setup.layers)
        self.checkpoint, self.picture = folder / "hf", folder / "picture.png"
        convert(source, self.checkpoint, to="llava-hf", check=False)
        shutil.rmtree(source)
        Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(self.picture)

    def measure(self, case: str) -> list[Measured]:
        device, dtype = str(self.setup.target.device), self.setup.target.dtype_name
        options = ["--model", str(self.checkpoint), "--max-new-tokens", "4", "--dtype", dtype, "--device", device]
        commands = {
            OURS: [*LLAVA, "ask", str(self.picture), QUESTION, *options],
            PEER: [sys.executable, __file__, str(self.checkpoint), str(self.picture), device, dtype],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(1 + self.setup.lengths.starts):
            for name, command in commands.items():
                seconds[name].append(first_byte(command, self.checkpoint))
                print(f"start, {name}: {seconds[name][-1]:.2f} s", flush=True)
        return [
            Measured(case=case, contestant=name, values=all[1:], unit="s", figures={"first_start": all[0]})
            for name, all in seconds.items()
        ]


def peer(folder: str, picture: str, device: str, dtype: str) -> None:
    """Loads the checkpoint with transformers, and prints the first token of a reply."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype), device_map=device)
    inputs = processor(
        images=Image.open(picture), text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt"
    ).to(device, model.dtype)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=1)
    print(repr(processor.decode(ids[0, -1:])), flush=True)


if __name__ == "__main__":
    peer(*sys.argv[1:])
