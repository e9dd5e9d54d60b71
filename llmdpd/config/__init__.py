"""The configuration of a run: schema, presets, reading and writing."""
