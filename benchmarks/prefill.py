"""How long does the first token of an answer take? Compared with transformers.

Batch 1, from pixels (with --no-image: token ids) on the host through tower, projector and decoder, which fills the
cache, to the most likely next id on the host. Ours are the engine's steps for a new request, in chunks of its default
size; its caches of prefixes and features are not used. Opening and resizing pictures and encoding text are not
included.

    python benchmarks/prefill.py --size tiny
"""

from statistics import median
from typing import Annotated, Any, cast

import torch
import typer
from ceilings import best, decoder_flops, matmul_ceilings, rates, tower_flops
from peers import check_agreement, hub_tensors, peer, peer_configs
from result import OURS, PEER, Commit, Out, Result, Save, benchmark_name
from shapes import Layers, Size, engine_for, engine_logits, llava_config, random_llava
from timing import Device, DType, Runs, Target, Threads, alternate

from llava.config import IMAGE, LlavaConfig
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams
from llava.model.llava import Llava
from llava.preprocess.inputs import ModelInput


def request(config: LlavaConfig, tokens: int) -> ModelInput:
    """A prompt of random ids; with a tower, it holds a picture of random pixels from its fifth position on."""
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.decoder.vocab_size - 1, (tokens,), generator=seed)
    if config.vision is None:
        return ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)
    n, side = config.vision.n_features, config.vision.image_size
    if tokens < n + 8:
        raise typer.BadParameter(f"--tokens {tokens}: the picture takes {n}; give at least {n + 8}")
    token_ids = [*ids[:4].tolist(), IMAGE, *ids[4 + n :].tolist()]
    ids[4 : 4 + n] = IMAGE
    pixels = torch.randn(1, 3, side, side, generator=seed)
    return ModelInput(prompt="", token_ids=token_ids, ids=ids, labels=ids, pixels=pixels, views=[1], grids=[None])


def build_peer(config: LlavaConfig, model: Llava, target: Target) -> Any:
    """transformers' Llava or, without a tower, its Llama. The last id of the vocabulary is the image token."""
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
    from transformers import LlavaConfig as PeerConfig

    text, tower = peer_configs(config)
    if tower is None:
        return peer(LlamaForCausalLM, text, hub_tensors(model.state_dict()), target)
    settings = cast(Any, PeerConfig)(
        vision_config=tower,
        text_config=text,
        image_token_id=config.decoder.vocab_size - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    tensors = hub_tensors(model.state_dict(), tower.num_hidden_layers)
    return peer(LlavaForConditionalGeneration, settings, tensors, target)


@torch.inference_mode()
def peer_logits(model: Any, input: ModelInput, target: Target) -> torch.Tensor:
    """transformers' logits after the prompt."""
    pictures = {} if input.pixels is None else {"pixel_values": input.pixels.to(target.device, target.dtype)}
    ids = input.ids.masked_fill(input.ids == IMAGE, model.config.get_text_config().vocab_size - 1)
    return model(ids[None].to(target.device), use_cache=True, logits_to_keep=1, **pictures).logits[:, -1]


def first_token(engine: Engine, input: ModelInput) -> list[int]:
    """Our first token after the prompt."""
    engine.features.reset()
    engine.add_request(input, SamplingParams(max_new_tokens=1))
    ids = []
    while engine.has_requests:
        ids += [id for output in engine.step() for id in output.token_ids]
    return ids


def main(
    device: Device = "auto",
    dtype: DType = "bfloat16",
    layers: Layers = None,
    size: Size = "7b",
    runs: Runs = 5,
    threads: Threads = None,
    image: Annotated[bool, typer.Option("--image/--no-image", help="with a picture, or text only")] = True,
    tokens: Annotated[int | None, typer.Option("--tokens", help="prompt tokens; default: 640 (text only: 128)")] = None,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    """Time to the first token, compared with transformers."""
    target = Target.from_options(device, dtype, threads)
    config = llava_config(size, layers, vision=image)
    n = tokens or (640 if image else 128)
    input = request(config, n)
    model = random_llava(config, target)
    theirs = build_peer(config, model, target)
    engine = engine_for(model)
    error = check_agreement(engine_logits(engine, input), peer_logits(theirs, input, target), target)
    ceilings = matmul_ceilings(target, size)
    assert len(first_token(engine, input)) == 1
    contestants = {
        OURS: lambda: target.seconds(lambda: first_token(engine, input)),
        PEER: lambda: target.seconds(lambda: peer_logits(theirs, input, target).argmax(-1).tolist()),
    }
    seconds = alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    work = flops(config, n)
    ceiling = best(ceilings, seconds)
    speeds = rates(work, contestants, ceilings, seconds)
    Result(
        benchmark=benchmark_name("prefill", layers=layers, size=size, extra="" if image else "text"),
        question="How long does the first token of an answer take?",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": 1, "tokens": n,
            "image_tokens": int((input.ids == IMAGE).sum()), "runs": runs,
            "chunk_tokens": engine.scheduler.chunk_tokens,
            "peer_attention": theirs.config.get_text_config()._attn_implementation,
        },
        seconds=seconds,
        more={
            name: {"TFLOP/s": rate / 1e12, "of the ceiling": rate / ceiling}
            | ({"tokens/s": n / median(seconds[name])} if name in contestants else {})
            for name, rate in speeds.items()
        },
        figures={"relative_difference": error, "TFLOP": work / 1e12},
        commit=commit,
    ).report(out, save)  # fmt: skip


def flops(config: LlavaConfig, tokens: int) -> float:
    """Operations for a prompt of `tokens` tokens, its picture included."""
    work = decoder_flops(config.decoder, tokens)
    if config.vision and config.projector:
        wide, dim = config.projector.in_dim, config.projector.out_dim
        work += tower_flops(config.vision) + 2.0 * config.vision.n_features * dim * (wide + dim)
    return work


if __name__ == "__main__":
    typer.run(main)
