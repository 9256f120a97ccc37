"""Programs that a model writes: reading the problems, making a program of an answer, and running it without harm."""
