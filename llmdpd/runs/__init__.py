"""A run: its folder, its prompts, its evaluation, and the pipeline from data to report."""
