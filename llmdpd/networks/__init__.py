"""The networks that policies are made of, by method (`methods`)."""
