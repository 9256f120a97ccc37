"""`python -m safecl`, e.g. under torchrun: `torchrun --nproc-per-node 2 -m safecl train run.yaml`."""

from safecl.cli import main

main()
