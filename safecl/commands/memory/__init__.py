"""The verbs of `safecl memory`."""
