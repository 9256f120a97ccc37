"""Asking a model: prompts, generation, likelihood."""
