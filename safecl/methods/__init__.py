"""One file per continual-learning method: its config and its behaviour. A method knows losses and shard terms, not
DeepSpeed.

The files in the family folders (`penalties/`, `averages/`, ...) are the methods; what stands beside the folders is for
all of them. The registry (safecl/config/methods.py) finds a new file by itself, and no other file knows its name.
"""
