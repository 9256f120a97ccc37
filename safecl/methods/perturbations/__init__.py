"""Methods that move weights before they take a gradient."""
