"""Layers and functions of vLLM's models, computed by torch_npu's operators.

`norm` is registered with vLLM's IR, which chooses between implementations by their arguments. `layers` replaces whole
layers, and must be imported before a model is built. `experts` and `quantized` hold functions on plain tensors, which
the methods of quantised layers call as well; `layout` says how the weights lie that these are given.
"""
