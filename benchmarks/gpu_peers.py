"""The peers in `gpu.py`: transformers and gpt-fast, with random weights of the same shapes."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from decode import answered, peer_answered, same_tokens
from gpu_inputs import random_ids, random_picture_input, random_pixels, text_input
from gpu_setup import CLIP_BATCHES, DECODE_ROWS, Measured, Setup, Skipped
from peers import check_agreement, hub_tensors, peer, peer_configs
from prefill import build_peer, peer_logits
from result import PEER
from shapes import engine_for, engine_logits, llava_config, random_llava, with_random_weights

from llava.config import IMAGE
from llava.preprocess.inputs import ModelInput

GPT_FAST = "gpt-fast"
_STEPS = 32  # timed steps of one row
_ROW_STEPS = 6  # timed steps of several rows


class Transformers:
    """transformers' Llava and Llama, whose weights are views of ours."""

    def __init__(self, setup: Setup):
        from transformers import LlamaForCausalLM

        self.setup, self.target, self.lengths = setup, setup.target, setup.lengths
        self.config = llava_config(setup.size, setup.layers, vision=True)
        self.ours = random_llava(self.config, self.target)
        self.llava = build_peer(self.config, self.ours, self.target)
        self.llava.generation_config.eos_token_id = None
        text = peer_configs(self.config)[0]
        self.llama = peer(LlamaForCausalLM, text, hub_tensors(self.ours.state_dict()), self.target)

    def input(self, seed: int) -> ModelInput:
        return random_picture_input(self.config, self.lengths.text, seed)

    def agreement(self, case: str) -> Measured:
        """The relative difference of our logits after a picture, and how many greedy tokens are the same."""
        engine, input = engine_for(self.ours), self.input(0)
        error = check_agreement(engine_logits(engine, input), peer_logits(self.llava, input, self.target), self.target)
        text, n = text_input(self.config, self.lengths.text, seed=1), 16
        theirs = peer_answered(self.llama, text.ids.to(self.target.device), n)[1]
        same = same_tokens(answered(engine, text, n).token_ids, theirs)
        return self.measured(case, "relative difference", [error], same_tokens=same, of_tokens=n + 1)

    def decode_one(self, case: str, cached: int) -> Measured:
        ids = random_ids(cached - _STEPS // 2, self.config.decoder.vocab_size, 1).to(self.target.device)
        peer_answered(self.llama, ids, 3)
        values = [_STEPS / peer_answered(self.llama, ids, _STEPS)[0] for _ in range(2)]
        return self.measured(case, "tok/s", values)

    @torch.inference_mode()
    def decode_many(self, case: str, rows: int) -> Measured:
        """A padded batch: a loop over the model with its default cache, which is faster than `generate`."""
        vocab = self.config.decoder.vocab_size
        ids = torch.stack([random_ids(self.lengths.cached, vocab, seed) for seed in range(rows)]).to(self.target.device)
        state = self.llama(ids, use_cache=True, logits_to_keep=1)
        values = []
        for _ in range(2 + _ROW_STEPS):
            started = time.perf_counter()
            new = state.logits[:, -1].argmax(-1, keepdim=True)
            state = self.llama(new, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)
            self.target.synchronize()
            values.append(rows / (time.perf_counter() - started))
        return self.measured(case, "tok/s", values[2:])

    def first_token(self, case: str) -> Measured:
        inputs = [self.input(seed) for seed in range(self.lengths.first_tokens + 2)]

        def ms(input: ModelInput) -> float:
            work = lambda: peer_logits(self.llava, input, self.target).argmax(-1).tolist()  # noqa: E731
            return 1e3 * self.target.seconds(work)

        return self.measured(case, "ms", [ms(input) for input in inputs][2:])

    @torch.inference_mode()
    def clip(self, case: str, batch: int) -> Measured:
        tower = self.config.vision
        assert tower
        pixels = random_pixels(batch, tower.image_size, 1).to(self.target.device, self.target.dtype)

        def features() -> torch.Tensor:
            states = self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            return states[tower.select_layer][:, 1:]

        n = min(5, self.lengths.clip_batches)
        features()
        seconds = [self.target.seconds(lambda: [features() for _ in range(n)]) for _ in range(3)]
        return self.measured(case, "images/s", [batch * n / s for s in seconds])

    @torch.inference_mode()
    def requests(self, case: str) -> Measured:
        """One padded batch through `generate`."""
        n = self.lengths
        inputs = [self.input(seed) for seed in range(n.requests)]

        def seconds(inputs: Sequence[ModelInput], new: int) -> float:
            ids = torch.stack([one.ids for one in inputs])
            ids = ids.masked_fill(ids == IMAGE, self.llava.config.image_token_id).to(self.target.device)
            pixels = torch.cat([one.pixels for one in inputs if one.pixels is not None])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            started = time.perf_counter()
            replies = self.llava.generate(
                **batch,
                pixel_values=pixels.to(self.target.device, self.target.dtype),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=0,
            )
            self.target.synchronize()
            elapsed = time.perf_counter() - started
            assert replies.shape[1] == ids.shape[1] + new
            return elapsed

        seconds(inputs[:2], min(4, n.new))
        return self.measured(case, "requests/s", [n.requests / seconds(inputs, n.new)])

    def measured(self, case: str, unit: str, values: Sequence[float], **figures: Any) -> Measured:
        return Measured(case=case, contestant=PEER, values=values, unit=unit, figures=figures)

    def measure(self, case: str) -> list[Measured]:
        n = self.lengths
        cases: dict[str, Callable[[str], Measured]] = {
            "agreement": self.agreement,
            "decode-1": partial(self.decode_one, cached=n.cached),
            "decode-4000": partial(self.decode_one, cached=n.long),
            **{name: partial(self.decode_many, rows=rows) for name, rows in DECODE_ROWS.items()},
            "first-token": self.first_token,
            **{name: partial(self.clip, batch=batch) for name, batch in CLIP_BATCHES.items()},
            "requests-128": self.requests,
        }
        found = cases[case](case)
        if self.target.on_gpu:
            torch.cuda.empty_cache()
        return [found]


class GptFast:
    """gpt-fast's own model and decoding loop, compiled as its `generate.py --compile` does; not compiled on a CPU."""

    _SAMPLING = {"temperature": 0.8, "top_k": 200}  # its defaults  # noqa: RUF012

    def __init__(self, setup: Setup):
        self.setup, self.target, self.lengths = setup, setup.target, setup.lengths
        self.source, classes = import_gpt_fast(setup.gpt_fast)
        sizes = llava_config(setup.size, setup.layers, vision=False).decoder
        settings = classes.ModelArgs(
            block_size=sizes.max_seq + 8,  # its default of 2048 is too short for `decode-4000`
            vocab_size=sizes.vocab_size,
            n_layer=sizes.n_layers,
            n_head=sizes.n_heads,
            dim=sizes.dim,
            intermediate_size=sizes.mlp_dim,
            norm_eps=sizes.eps,
        )
        with torch.device("meta"):
            empty = classes.Transformer(settings)
        self.model, self.vocab_size = with_random_weights(empty, self.target), sizes.vocab_size
        if self.target.on_gpu:
            self.source.decode_one_token = torch.compile(
                self.source.decode_one_token, mode="reduce-overhead", fullgraph=True
            )

    @torch.no_grad()
    def decode(self, case: str, cached: int, steps: int) -> Measured:
        """Tokens per second of its `decode_n_tokens`, which reads its whole static cache in every step."""
        device, prompt = self.target.device, cached - steps // 2
        with device:
            self.model.setup_caches(max_batch_size=1, max_seq_length=prompt + steps + 1)
        ids = random_ids(prompt, self.vocab_size, 1)[None].to(device)
        first = self.source.prefill(self.model, ids, torch.arange(prompt, device=device), **self._SAMPLING).clone()

        def seconds(n: int) -> float:
            position = torch.tensor([prompt], device=device, dtype=torch.int)
            arguments = (self.model, first.view(1, -1).clone(), position, n)
            return self.target.seconds(lambda: self.source.decode_n_tokens(*arguments, **self._SAMPLING))

        for _ in range(3):  # compiles, records the graph, replays it
            seconds(min(8, steps))
        values = [steps / seconds(steps) for _ in range(2)]
        return Measured(case=case, contestant=GPT_FAST, values=values, unit="tok/s", figures={"prompt": prompt})

    def measure(self, case: str) -> list[Measured]:
        n = self.lengths
        cached, steps = {"decode-1": (n.cached, n.steps), "decode-4000": (n.long, min(n.steps, 128))}[case]
        return [self.decode(case, cached, steps)]


def import_gpt_fast(folder: str | None) -> tuple[Any, Any]:
    """Imports `generate` and `model` from gpt-fast's source. Its tokenizer, which needs more packages, is not used."""
    if folder is None or not (Path(folder) / "generate.py").is_file():
        raise Skipped("its source was not found; give its folder with --gpt-fast")
    sys.path.insert(0, folder)
    tokenizer = ModuleType("tokenizer")
    tokenizer.get_tokenizer = None  # type: ignore[attr-defined]
    sys.modules["tokenizer"] = tokenizer
    import generate
    import model

    return generate, model
