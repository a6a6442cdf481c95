"""Frozen towers: no gradient, and in evaluation mode whatever the surrounding model does."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(module: ModuleT) -> ModuleT:
    """Put `module` in evaluation mode, switch off the gradient of all its parameters, and return
    it.
    """
    return module.eval().requires_grad_(False)


class Frozen(nn.Module):
    """Base of the wrappers around a frozen tower: `train()` on it, or on any model that holds it,
    keeps it in eval.

    Wrap a module that `freeze` has treated. With no parameter asking for a gradient, inputs that
    ask for none build no graph, so the wrappers need no `torch.no_grad()`, which would stand in the
    way of `torch.export`.
    """

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)
