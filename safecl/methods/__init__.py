"""One file per continual-learning method: its config and its behaviour. Knows losses and shard terms, not DeepSpeed."""
