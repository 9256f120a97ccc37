"""What ranks import, for the server that forks them."""

import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import deepspeed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import safecl.training.resume
import safecl.training.trainer  # noqa: F401
