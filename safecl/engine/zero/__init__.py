"""The flat ZeRO shards, their state and the optimizer's pass over them."""
