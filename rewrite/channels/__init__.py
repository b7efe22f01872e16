"""Which channels must change together, and how wide they may become."""
