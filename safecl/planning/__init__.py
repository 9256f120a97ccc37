"""What a run does and what it takes, before anything is loaded."""
