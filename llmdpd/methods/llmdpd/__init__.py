"""Algorithm 1 of the paper, the default, and its relatives."""
