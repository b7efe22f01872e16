"""How often a tensor was written to, as autograd counts it."""

from __future__ import annotations

__all__ = ["version_of"]

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """Return a tensor's version; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version
