"""Reading the models that are merged, and checking that they fit together."""
