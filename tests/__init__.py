"""Tests of everything; Triton's kernels run in its interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
