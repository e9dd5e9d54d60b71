"""Policies for other machines: the whole action, with the prompt folded in, without this package."""
