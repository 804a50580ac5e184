"""A process that has weights: who may take them and when, and its session with each client."""
