"""Training: batches under prompts, checkpoints, metrics, and the loop that joins them to a learner."""
