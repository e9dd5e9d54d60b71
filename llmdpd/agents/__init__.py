"""Agents: one file an algorithm, losses and update steps and nothing else."""
