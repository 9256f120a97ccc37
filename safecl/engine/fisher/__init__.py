"""The diagonal Fisher information: its estimate, thresholds, file, and the pull of LoRA's products."""
