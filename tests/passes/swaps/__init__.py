"""Tests of the swaps of convolutions for blocks."""
