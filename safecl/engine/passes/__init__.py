"""Passes over rows: micro-batches, gradients, forward passes, losses."""
