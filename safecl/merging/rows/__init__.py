"""Rows that run through a model, for merges that need activations or gradients."""
