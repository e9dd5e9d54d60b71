"""Roll-outs, scoring, results, non-learned baselines."""
