"""`safecl proof`: silent failures of the field, each measured live beside safecl. One file per failure; run.py starts
and shows them.

Each file has the usual way as published code has it, safecl's way, and `measure()`, which runs both and compares them
with the right answer. The usual way takes its remedy as an argument, so that a test can show that the measurement reads
right where the code is right.
"""
