"""`safecl proof`: measures silent failures of common training code, and safecl on the same task. One file per failure;
run.py starts and shows them.

Each file has the usual way, as published code does it, safecl's way, and `measure()`, which runs both and compares them
with the right answer. The usual way takes its remedy as an argument, so that a test can show that the measurement is
right where the code is right.
"""
