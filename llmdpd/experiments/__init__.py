"""The paper's tables and figures as grids of runs: which cells, running them, and a page of what came out."""
