"""The steps of a run: their rows, the passes and terms of methods, and the state that they share."""
