"""transformers' own model of an architecture, without storage, and the weights of any source for it."""
