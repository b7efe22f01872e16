"""Volumes by tiles: exact, in slabs, or in windows."""
