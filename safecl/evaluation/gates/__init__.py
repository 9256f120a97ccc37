"""Gates: the decision whether a model may be handed over."""
