"""MTDiff-p."""
