"""Methods that average weights."""
