"""Methods that leave some weights as they are."""
