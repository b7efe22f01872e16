"""Tensors kept for the backward pass wait in host memory or on disk."""
