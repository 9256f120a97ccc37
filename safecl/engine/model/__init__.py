"""The Hugging Face model: settings, structure, adapters, the wrapped module, checks at the start."""
