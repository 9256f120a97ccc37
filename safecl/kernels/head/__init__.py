"""The fused head: cross-entropy and distillation in one pass over lm_head."""
