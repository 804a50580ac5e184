"""What one rank of an instance does with its weights: fill a model, serve what it has, and say how it went."""
