"""What several passes use: forwards that stand in for a module's own, and second runs."""
