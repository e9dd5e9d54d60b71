"""TD3+BC, and under RAD and S4RL."""
