"""Normalisation and activation fused into one operator that overwrites its input."""
