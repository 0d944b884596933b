"""A LLaVA and a training loop written with transformers, to compare with ours."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.preprocess.inputs import ModelInput
from llava.train.recipe import Recipe
from tests import tiny, training
from tests.training import Assets, net_and_dataset


def raw(model: Path) -> dict[str, Tensor]:
    """The tensors of a folder by their names on disk."""
    if (model / "mm_projector.bin").is_file():
        return torch.load(model / "mm_projector.bin", weights_only=True)
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Plain(nn.Module):
    """LLaVA-1.5 assembled from parts of transformers."""

    def __init__(self, assets: Assets) -> None:
        transformers = pytest.importorskip("transformers")
        super().__init__()
        tensors = raw(assets.llava)
        config = transformers.LlamaConfig.from_pretrained(assets.llama)
        self.llama = transformers.LlamaForCausalLM(config)
        own = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
        self.llama.load_state_dict(own)
        self.tower = transformers.CLIPVisionModel.from_pretrained(assets.clip, dtype=torch.float32).requires_grad_(
            False
        )
        self.mm_projector = nn.Sequential(nn.Linear(tiny.CLIP_DIM, 64), nn.GELU(), nn.Linear(64, 64))
        prefix = "model.mm_projector."
        self.mm_projector.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )

    def forward(self, inputs: list[ModelInput]) -> Tensor:
        """transformers' own loss on right-padded rows."""
        pad = nn.utils.rnn.pad_sequence
        ids = pad([one.ids for one in inputs], batch_first=True)
        labels = pad([one.labels for one in inputs], batch_first=True, padding_value=-100)
        mask = pad([torch.ones(len(one.ids)) for one in inputs], batch_first=True)
        x = self.llama.get_input_embeddings()(ids.clamp(min=0))
        if pixels := [one.pixels for one in inputs if one.pixels is not None]:
            states = self.tower(torch.cat(pixels), output_hidden_states=True).hidden_states
            x = x.masked_scatter((ids < 0)[..., None], self.mm_projector(states[-2][:, 1:]))
        loss: Tensor = self.llama(inputs_embeds=x, attention_mask=mask, labels=labels).loss
        return loss

    def named(self) -> dict[str, Tensor]:
        """The parameters by their names in a LLaVA checkpoint."""
        projector = {f"model.{name}": p for name, p in self.named_parameters() if name.startswith("mm_projector")}
        return {**dict(self.llama.named_parameters()), **projector}


def plain_loop(model: nn.Module, recipe: Recipe, parameters: list[dict[str, Any]]) -> list[float]:
    """An ordinary training loop with transformers. Returns the losses."""
    transformers = pytest.importorskip("transformers")
    _, dataset = net_and_dataset(recipe)
    n = recipe.max_steps
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(recipe.warmup_ratio * n), n)
    found = []
    for step in range(n):
        loss = model(training.inputs_of(dataset, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
