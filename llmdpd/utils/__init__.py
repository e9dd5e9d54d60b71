"""Files, plain values, progress, cores."""
