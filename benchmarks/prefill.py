"""How long does the first token of an answer take? Beside transformers.

Batch 1, from pixels on the host (with --no-image: token ids) through tower, projector and decoder, cache written, to
the likeliest id behind the last token, on the host. Pictures are opened and resized before, text is encoded before.

    python benchmarks/prefill.py --size tiny
"""

from statistics import median
from typing import Annotated, Any, cast

import bench
import torch
import typer
from bench import OURS, PEER, Place
from decode import Words

from llava.config import IMAGE, LlavaConfig
from llava.engine import step
from llava.engine.engine import Engine
from llava.engine.sampling import SamplingParams
from llava.model.attention import CacheContext
from llava.model.kv_cache import KVCache
from llava.model.llava import Llava
from llava.preprocess.inputs import ModelInput


def request(config: LlavaConfig, tokens: int) -> ModelInput:
    """A prompt of random ids; with a tower, a picture of random pixels begins at its fifth place."""
    seed = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.decoder.vocab_size - 1, (tokens,), generator=seed)
    if config.vision is None:
        return ModelInput(prompt="", token_ids=ids.tolist(), ids=ids, labels=ids)
    n, side = config.vision.n_features, config.vision.image_size
    if tokens < n + 8:
        raise typer.BadParameter(f"--tokens {tokens}: the picture alone takes {n}; give at least {n + 8}")
    token_ids = [*ids[:4].tolist(), IMAGE, *ids[4 + n :].tolist()]
    ids[4 : 4 + n] = IMAGE
    pixels = torch.randn(1, 3, side, side, generator=seed)
    return ModelInput(prompt="", token_ids=token_ids, ids=ids, labels=ids, pixels=pixels, views=[1], grids=[None])


def build_peer(config: LlavaConfig, model: Llava, place: Place) -> Any:
    """transformers' Llava, or its Llama without a tower; the last row of the vocabulary stands for a picture."""
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
    from transformers import LlavaConfig as PeerConfig

    text, tower = bench.peer_configs(config)
    if tower is None:
        return bench.peer(LlamaForCausalLM, text, bench.hub_tensors(model.state_dict()), place)
    settings = cast(Any, PeerConfig)(
        vision_config=tower,
        text_config=text,
        image_token_id=config.decoder.vocab_size - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    tensors = bench.hub_tensors(model.state_dict(), tower.num_hidden_layers)
    return bench.peer(LlavaForConditionalGeneration, settings, tensors, place)


@torch.inference_mode()
def logits(engine: Engine, input: ModelInput, place: Place) -> torch.Tensor:
    """Ours behind the prompt."""
    x = engine.embed([input])
    n = x.shape[1]
    cache = KVCache(engine.model.config.decoder, 1, n, dtype=place.dtype, device=place.device)
    positions, last = torch.arange(n, device=place.device), torch.tensor([[n - 1]], device=place.device)
    context = CacheContext(positions=positions, seq_len=n, last=last, cache=cache, window=n)
    return step.prefill(engine.model, x, context)


@torch.inference_mode()
def peer_logits(model: Any, input: ModelInput, place: Place) -> torch.Tensor:
    """transformers' behind the prompt."""
    pictures = {} if input.pixels is None else {"pixel_values": input.pixels.to(place.device, place.dtype)}
    ids = input.ids.masked_fill(input.ids == IMAGE, model.config.get_text_config().vocab_size - 1)
    return model(ids[None].to(place.device), use_cache=True, logits_to_keep=1, **pictures).logits[:, -1]


def first_token(engine: Engine, input: ModelInput) -> list[int]:
    params = SamplingParams(max_new_tokens=1)
    sequence = engine.start(input, params)
    for _ in engine.run([sequence], params):
        pass
    return sequence.detokenizer.ids


def prefill(
    device: bench.Device = "auto",
    dtype: bench.DType = "bfloat16",
    layers: bench.Layers = None,
    size: bench.Size = "7b",
    runs: bench.Runs = 5,
    threads: bench.Threads = None,
    image: Annotated[bool, typer.Option("--image/--no-image", help="with a picture, or text alone")] = True,
    tokens: Annotated[int | None, typer.Option("--tokens", help="of the prompt; default 640, text alone 128")] = None,
    out: bench.Out = None,
    save: bench.Save = False,
    commit: bench.Commit = None,
) -> None:
    """Time to the first token, beside transformers."""
    place = Place.chosen(device, dtype, threads)
    config = bench.config(size, layers, vision=image)
    n = tokens or (640 if image else 128)
    input = request(config, n)
    model = bench.build(config, place)
    theirs = build_peer(config, model, place)
    engine = Engine(model, cast(Any, Words()))
    error = bench.agree(logits(engine, input, place), peer_logits(theirs, input, place), place)
    ceilings = bench.matmul_ceilings(place, size)
    contestants = {
        OURS: lambda: place.seconds(lambda: first_token(engine, input)),
        PEER: lambda: place.seconds(lambda: peer_logits(theirs, input, place).argmax(-1).tolist()),
    }
    seconds = bench.alternate({**contestants, **{c.name: c.run for c in ceilings}}, runs)
    work = flops(config, n)
    ceiling = bench.best(ceilings, seconds)
    amounts = {OURS: work, PEER: work, **{c.name: c.amount for c in ceilings}}
    rates = {name: amount / median(seconds[name]) for name, amount in amounts.items()}
    bench.Result(
        benchmark=bench.tag("prefill", layers=layers, size=size, extra="" if image else "text"),
        question="How long does the first token of an answer take?",
        device=place.device.type,
        dtype=place.dtype_name,
        settings={
            "size": size, "layers": config.decoder.n_layers, "batch": 1, "tokens": n,
            "image_tokens": int((input.ids == IMAGE).sum()), "runs": runs,
            "peer_attention": theirs.config.get_text_config()._attn_implementation,
        },
        seconds=seconds,
        more={
            name: {"TFLOP/s": rate / 1e12, "of the ceiling": rate / ceiling}
            | ({"tokens/s": n / median(seconds[name])} if name in contestants else {})
            for name, rate in rates.items()
        },
        figures={"relative_difference": error, "TFLOP": work / 1e12},
        commit=commit,
    ).report(out, save)  # fmt: skip


def flops(config: LlavaConfig, tokens: int) -> float:
    """What has to be done, by whomever."""
    work = bench.decoder_flops(config.decoder, tokens)
    if config.vision and config.projector:
        wide, dim = config.projector.in_dim, config.projector.out_dim
        work += bench.tower_flops(config.vision) + 2.0 * config.vision.n_features * dim * (wide + dim)
    return work


if __name__ == "__main__":
    typer.run(prefill)
