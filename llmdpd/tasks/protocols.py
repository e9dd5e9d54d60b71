"""Which tasks are trained on and which are held out: the splits by name."""
