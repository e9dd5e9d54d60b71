"""OGBench's manipulation (Park et al. 2025, arXiv 2410.20092) as a task suite: a UR5e arm with things on a table."""
