"""Rewritten networks in several processes, on the CPU."""
