"""Kernels over flat tensors: EMA, Fisher, penalty, AdamW."""
