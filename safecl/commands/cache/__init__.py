"""`safecl cache ls` and `safecl cache clean`: what safecl keeps between runs."""
