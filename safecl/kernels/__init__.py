"""Device code: every kernel family is a Triton kernel, a CPU path and a torch twin of one signature. Knows tensors only."""
