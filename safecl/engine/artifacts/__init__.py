"""The store of artifacts, which all runs on one base model share, and the three kinds of artifacts."""
