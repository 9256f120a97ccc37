"""Formats, chat templates and masks, packing, and the order of examples."""
