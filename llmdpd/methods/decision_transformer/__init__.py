"""Decision Transformer and Prompt-DT."""
