"""Collecting trajectories: scripted experts and SAC."""
