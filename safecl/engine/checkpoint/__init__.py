"""Checkpoints: their format and folder, writing, reading, and the export of model folders."""
