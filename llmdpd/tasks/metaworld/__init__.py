"""The Meta-World suite."""
