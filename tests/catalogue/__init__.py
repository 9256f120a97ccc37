"""Failing inputs: rows, files, tokenizers, models, prompts and settings, each with the words of its refusal."""
