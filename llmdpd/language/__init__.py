"""Language models that learn: their files, their words, and the text that they go on learning from."""
