"""Chat templates: the text and tokens of messages, and the mask of the tokens that are trained."""
