"""The built-in demonstration: a corpus of our own templates, a tokenizer, a Llama of about 1 M parameters, run configs,
arms."""
