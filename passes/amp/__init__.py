"""Mixed precision: autocast around chosen modules."""
