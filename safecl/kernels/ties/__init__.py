"""Kernels of merges that trim task vectors and elect a sign for each weight."""
