"""Three disjoint ranges of environment seeds.

They keep an episode that was learned from, or that served as a trajectory prompt, from ever being an evaluated one.
"""

COLLECTION_SEED_END = 1_000_000_000
"""Seeds of collected episodes (and so of trajectory prompts) lie in [0, COLLECTION_SEED_END)."""
EVALUATION_SEED_START = 1_000_000_000
"""Seeds of evaluation episodes start here."""
SELECTION_SEED_START = 1_500_000_000
"""Seeds of the episodes that choose the best checkpoint start here, apart from those that report it."""
