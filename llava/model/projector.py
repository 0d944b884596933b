"""The projector from vision features to the decoder's width: a linear layer or an MLP. arXiv:2310.03744."""

from torch import nn

from llava.config import ProjectorConfig
from llava.model.linear import Linear


class Projector(nn.Sequential):
    """features [..., in_dim] -> [..., out_dim]: linear layers with an exact GELU in between.

    The linear layers are numbered 0, 2, 4, … as in published checkpoints.
    """

    def __init__(self, config: ProjectorConfig):
        layers: list[nn.Module] = []
        for i in range(config.depth):
            layers += [nn.GELU()] if i else []
            layers += [Linear(config.out_dim if i else config.in_dim, config.out_dim)]
        super().__init__(*layers)
