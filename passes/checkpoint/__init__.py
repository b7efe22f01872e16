"""Submodules whose forward runs a second time in the backward pass."""
