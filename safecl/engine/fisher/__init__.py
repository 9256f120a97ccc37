"""The diagonal Fisher information: its estimate, thresholds, file, and the penalty on LoRA's products."""
