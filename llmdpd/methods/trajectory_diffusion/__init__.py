"""Trajectory diffusion, the paper's ablation w/o-DP."""
