"""The plan of a run, made before a model is loaded: its rows, steps and checks, and the bytes that it takes."""
