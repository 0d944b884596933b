"""Copies of modules that share all weights, so that layers can be replaced without changing the original."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def shallow_copy(module: M, replace: Callable[[nn.Module], nn.Module | None] = lambda module: None) -> M:
    """Returns a copy of a module tree. replace: returns what to put in the place of a submodule, or None to copy it."""
    result = copy.copy(module)
    children = {
        name: child and (replace(child) or shallow_copy(child, replace)) for name, child in module._modules.items()
    }
    result.__dict__["_modules"] = children
    return result
