"""Every random draw gets its seed from a hash of what it is for, and is made on the CPU in float32.

So a draw depends on (run seed, purpose, indices) alone: not on batch size, rank, world size, device or earlier draws.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence

import torch

MAX_SEED = 2**63 - 1
# PyTorch's CPU generator reads the low 32 bits of its seed: a larger number would only repeat another one's draws.
MAX_IMAGE_SEED = 2**32 - 1


def derive_seed(run_seed: int, purpose: str, *indices: int) -> int:
    """Seed in [0, 2^63) for one draw: the first 63 bits of SHA-256 over the JSON list `[run_seed, purpose, *indices]`.

    JSON keeps different arguments apart ("a", 12 and "a1", 2 differ). Raises `TypeError` for numbers that are not
    integers.
    """
    key = [operator.index(run_seed), purpose, *(operator.index(index) for index in indices)]
    digest = hashlib.sha256(json.dumps(key, separators=(",", ":")).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int) -> torch.Generator:
    """A CPU generator started at `seed`, 0 <= seed < 2^63. Raises `ValueError` outside that range.

    Only the low 32 bits count (see `MAX_IMAGE_SEED`): among 10,000 derived seeds, two share a stream with probability
    0.012.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is outside 0..2^63-1")
    return torch.Generator(device="cpu").manual_seed(operator.index(seed))


def noise(seeds: Sequence[int], shape: Sequence[int], purpose: str = "latents") -> torch.Tensor:
    """Standard normal draws `[len(seeds), *shape]`, float32 on the CPU; row i depends on `seeds[i]` and `purpose` only
    (its last bits also on the CPU's vector instructions).

    The initial latents take the image's seed as it is, so that seed 7 here is seed 7 of `torch.manual_seed`; any other
    purpose (such as the churn of a stochastic solver) gets a stream of its own, derived from the seed and the purpose.
    """
    rows = torch.empty(len(seeds), *shape, dtype=torch.float32)
    for row, seed in zip(rows, seeds, strict=True):
        stream = seed if purpose == "latents" else derive_seed(seed, purpose)
        row.copy_(torch.randn(tuple(shape), generator=generator(stream), dtype=torch.float32))
    return rows
