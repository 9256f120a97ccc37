"""Starting the ranks of a run on one node or several: torchrun, the deepspeed launcher, Slurm and Kubernetes."""
