"""Make a network fit a memory budget, exactly where that can be."""
