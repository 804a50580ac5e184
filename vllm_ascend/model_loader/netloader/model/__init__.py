"""A PyTorch model as Netloader sees it: the tensors that are its weights, and what else loading sets on it."""
