"""The DeepSpeed side: flat shards, the shard optimizer, the wrapped model, the training loop."""
