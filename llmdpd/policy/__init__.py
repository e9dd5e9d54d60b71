"""A trained policy: load, prompt, act, save."""
