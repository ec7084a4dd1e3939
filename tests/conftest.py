"""One thread and no network for every test, set before anything imports torch or a hub client."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from torch_utils import determinism

torch.set_num_threads(1)
determinism.prepare()  # other than in a program, tests with matrix products on a GPU may come first

# A shell without job control starts what it puts in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
