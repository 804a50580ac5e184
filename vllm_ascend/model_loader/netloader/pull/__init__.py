"""`netloader pull`: what an instance holds, as a directory that vLLM loads without Netloader."""
