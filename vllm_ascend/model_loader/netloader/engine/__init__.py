"""What is specific to vLLM: its configuration, its loader, its workers, and how it reloads a model in place."""
