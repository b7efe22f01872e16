"""How a model becomes a graph: example inputs, a copy of the model, the traced operators."""
