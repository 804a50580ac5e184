"""Layers and functions of vLLM's models, computed by torch_npu's operators.

`norm` is registered with vLLM's IR, which chooses between implementations by their arguments. `layers` replaces whole
layers, and must be imported before a model is built.
"""
