"""Plan, check and apply: from a list of passes to a rewritten model."""
