"""LaMo: a Decision Transformer made of a language model."""
