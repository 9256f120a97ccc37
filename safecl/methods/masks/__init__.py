"""Methods that keep elements of a step from being taken."""
