"""The built-in demonstration: a corpus from templates, a tokenizer, a Llama of about 1 M parameters, run configs."""
