"""The training loop, from the trainer down."""
