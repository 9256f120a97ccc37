"""Methods that pull weights to an anchor."""
