"""Cheap operators are run again in the backward pass, convolutions are kept."""
