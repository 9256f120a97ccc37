"""Bodies of the verbs that are longer than a few lines. Each module imports torch only when its verb runs."""
