"""Fewer channels: ``Pocket`` clamps to the finest level's width, ``Width`` scales."""
