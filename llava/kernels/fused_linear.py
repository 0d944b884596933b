"""A linear layer together with the norm before it and the activation or residual sum after it.

Which kernel computes it depends on the number of rows: `matvec` for one, `skinny_matmul` for a few, and cuBLAS with
elementwise kernels around it for many.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from llava.kernels.gated import silu_mul_
from llava.kernels.matvec import matvec
from llava.kernels.rms_norm import eager_rms_norm, rms_norm
from llava.kernels.skinny_matmul import skinny_matmul
from llava.kernels.support import can_run

_FEW_ROWS = 64  # up to this many, reading the weight takes longer than multiplying
Activation = Literal["none", "silu", "gelu"]


class Norm(NamedTuple):
    """A norm over the last dimension, without a bias vector."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, K] -> [S, K]"""
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [S, K], weight [N, K] -> [S, N]: activation(norm(x) gate^T) * (norm(x) weight^T) clipped, + residual [S, N].

    Without a gate, the activation applies to the product with `weight`. `residual` may be overwritten. out: [S, N], of
    any floating-point type; default: as x.
    """
    if not can_run(x.device):
        y = eager_fused_linear(x, weight, norm=norm, gate=gate, activation=activation, residual=residual, clip=clip)
        return y if out is None else out.copy_(y)
    n_rows = len(x)
    if n_rows > _FEW_ROWS:
        y = _with_many_rows(x, weight, norm, gate, activation, residual, clip)
        return y if out is None else out.copy_(y)
    out = x.new_empty(n_rows, len(weight)) if out is None else out
    if n_rows == 1:
        return matvec(x, weight, out, norm=norm, gate=gate, activation=activation, residual=residual, clip=clip)
    x = norm(x) if norm else x
    if clip is None:
        return skinny_matmul(x, weight, out, gate=gate, activation=activation, residual=residual)
    y = skinny_matmul(x, weight, out, gate=gate, activation=activation).clamp_(-clip, clip)
    return y if residual is None else y.add_(residual)


def _with_many_rows(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None,
    gate: Tensor | None,
    activation: Activation,
    residual: Tensor | None,
    clip: float | None,
) -> Tensor:
    x = norm(x) if norm else x
    if residual is not None and gate is None and activation == "none" and clip is None:
        return residual.addmm_(x, weight.T)
    y = F.linear(x, weight)
    if gate is not None and activation == "silu":
        y = silu_mul_(F.linear(x, gate), y)
    elif gate is not None:
        y.mul_(_activated(F.linear(x, gate), activation))
    else:
        y = _activated(y, activation)
    y = y if clip is None else y.clamp_(-clip, clip)
    return y if residual is None else y.add_(residual)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return x
    return F.gelu(x) if activation == "gelu" else F.silu(x)


def eager_fused_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """The twin of `fused_linear`, in float32 between its input and its output."""
    x32 = x.float()
    if norm is not None:
        x32 = (
            eager_rms_norm(x32, norm.weight, norm.eps)
            if norm.kind == "rms"
            else F.layer_norm(x32, x.shape[-1:], norm.weight.float(), None, norm.eps)
        )
    y = F.linear(x32, weight.float())
    y = _activated(y, activation) if gate is None else _activated(F.linear(x32, gate.float()), activation) * y
    y = y if clip is None else y.clamp(-clip, clip)
    return (y if residual is None else y + residual.float()).to(x.dtype)
