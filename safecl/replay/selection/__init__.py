"""What the replay buffer keeps and what it draws."""
