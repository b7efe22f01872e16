"""Two networks in a row: a coarse whole image guides tiles at full resolution."""
