"""Real vLLM: the models that it loads, and the processes that load and serve them."""
