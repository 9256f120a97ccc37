"""Methods that project gradients."""
