"""The weights of one rank as bytes: which tensors there are, what they must be equal to, and the memory they lie in."""
