"""Merges that restore safety: from an aligned model, or from what harmful and kept rows need."""
