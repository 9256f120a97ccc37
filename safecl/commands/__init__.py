"""The bodies of the verbs, one module each. A module imports torch only when its verb runs."""
