"""Methods that replay memory rows."""
