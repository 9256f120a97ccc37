"""Answers of a server in the place of the engine's own generation (`safety.backend: vllm`)."""
