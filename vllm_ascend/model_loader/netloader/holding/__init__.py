"""Weights without a model: what others hold, how it is asked for, and how it is passed on while it comes."""
