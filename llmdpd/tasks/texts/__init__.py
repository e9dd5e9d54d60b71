"""Text prompts: structured text, and how it is made from an environment's documentation."""
