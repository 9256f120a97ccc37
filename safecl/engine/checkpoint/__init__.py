"""Checkpoints: formats, folders, saving, reading, and the export of model folders."""
