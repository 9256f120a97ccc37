"""Continual-learning methods, one file each: the config and the behaviour. A method knows losses and shards, not
DeepSpeed.

The files in the family folders (`penalties/`, `averages/`, ...) are the methods; the modules next to these folders are
shared by all of them. The registry (safecl/config/method_registry.py) finds a new file by itself, and no other file
names it.
"""
