"""One thread and no network for every test, set before anything imports torch or a hub client."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

# A shell without job control starts what it puts in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
