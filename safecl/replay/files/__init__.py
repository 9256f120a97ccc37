"""The replay buffer's formats on the disk."""
