"""The reference weights theta_0, once per node."""
