"""Meta-World's tasks, each under two instructions: which of them is meant, only the text says."""
