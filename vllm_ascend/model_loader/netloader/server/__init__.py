"""A process that has weights: what it serves, who may take it and when, and its session with each client."""
