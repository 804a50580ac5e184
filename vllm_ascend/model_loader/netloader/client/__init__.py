"""A process that wants weights: in which order it asks sources, and its session with each of them."""
