"""The choice of rows: which stay in the memory, which a step draws."""
