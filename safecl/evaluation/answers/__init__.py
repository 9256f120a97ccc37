"""How a model is asked: generation, likelihood, prompts."""
