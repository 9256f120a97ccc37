"""The store of what runs on one base model share, and the three kinds of artifacts in it."""
