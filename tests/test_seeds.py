"""Seeds and noise: committed values that must never change, and independence from everything but the seed."""

from __future__ import annotations

import hashlib

import pytest
import torch

from torch_utils.seeds import MAX_IMAGE_SEED, MAX_SEED, derive_seed, generator, noise

# The first 16 hex digits that `sha256sum` prints for the JSON text, shifted right by one bit.
GOLDEN_SEEDS = [
    ((0, "latents"), int("92f358fbb4e986a9", 16) // 2),
    ((2024, "rollout", 3, 1), int("352a7c277c26797b", 16) // 2),
    ((-1, "ü", 0), int("ab5ae3be83cb3ef1", 16) // 2),
]


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN_SEEDS)
def test_derived_seeds_never_change(arguments, expected):
    assert derive_seed(*arguments) == expected


def test_derived_seeds_keep_different_arguments_apart():
    arguments = [
        (1, "a"),
        (1, "a", 0),
        (1, "a", 0, 0),
        (1, "a", 1, 2),
        (1, "a", 12),
        (1, "a", 2, 1),
        (1, "a1", 2),
        (11, "a", 2),
        (1, 'a",1,"', 2),
        (1, "a,1", 2),
        (1, ""),
        (-1, "a"),
        (2**70, "a"),
    ]
    seeds = [derive_seed(*a) for a in arguments]
    assert len(set(seeds)) == len(arguments)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_derived_seeds_take_any_integer_type_and_nothing_else():
    assert derive_seed(torch.tensor(5).item(), "x", torch.tensor(3)) == derive_seed(5, "x", 3)
    with pytest.raises(TypeError):
        derive_seed(1.0, "x")
    with pytest.raises(TypeError):
        derive_seed(1, "x", "2")


def test_noise_never_changes():
    # The tolerance covers the vector instructions of other CPUs; a changed generator would be off by about one.
    small = torch.tensor([[1.54099607, -0.29342890, -2.17878938, 0.56843126]])
    torch.testing.assert_close(noise([0], (4,)), small, rtol=0, atol=2e-6)
    latents = noise([7], (4, 16, 16)).flatten()[[0, 1, 500, 1023]]
    torch.testing.assert_close(
        latents, torch.tensor([-0.82013452, 0.39563116, 0.68151426, -0.90410024]), rtol=0, atol=2e-6
    )
    churn = torch.tensor([[-0.83537167, -0.51906538, -0.90902334, -1.17532122]])
    torch.testing.assert_close(noise([7], (4,), "churn"), churn, rtol=0, atol=2e-6)


def test_each_row_depends_on_its_own_seed_only():
    shape = (4, 8, 8)
    together = noise([5, 6, 5, 1000], shape)
    assert together.shape == (4, *shape)
    assert together.dtype == torch.float32
    assert together.device.type == "cpu"
    for row, seed in zip(together, [5, 6, 5, 1000], strict=True):
        assert torch.equal(row, noise([seed], shape)[0])
    assert torch.equal(noise([1000, 5], shape), together[[3, 0]])


def test_noise_ignores_and_keeps_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = noise([3], (16,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise([3], (16,)), first)


def test_image_seed_is_the_plain_torch_seed():
    assert torch.equal(noise([7], (3, 5))[0], torch.randn(3, 5, generator=torch.Generator().manual_seed(7)))


def test_other_purposes_are_other_streams():
    latents, churn, dropout = (noise([7], (4096,), purpose)[0] for purpose in ("latents", "churn", "dropout"))
    for a, b in ((latents, churn), (latents, dropout), (churn, dropout)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.06  # four standard errors of 1/64
    assert torch.equal(churn, noise([derive_seed(7, "churn")], (4096,))[0])


def test_noise_is_standard_normal_across_neighbouring_seeds():
    draws = noise(range(4096), (4,)).double()
    assert draws.mean().abs() < 4 / 128  # 4096 * 4 values: standard error 1/128
    assert abs(draws.var() - 1) < 4 * (2 / draws.numel()) ** 0.5
    neighbours = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(neighbours) < 4 / 64


def test_empty_seed_list_gives_no_rows():
    assert noise([], (2, 3)).shape == (0, 2, 3)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed {seed}"):
        generator(seed)
    with pytest.raises(ValueError, match=f"seed {seed}"):
        noise([0, seed], (1,))


def test_the_largest_image_seed_is_the_last_with_draws_of_its_own():
    rows = noise([MAX_IMAGE_SEED, 0, MAX_IMAGE_SEED + 1], (8,))
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1], rows[2])


def test_derived_seeds_look_uniform_in_the_bits_that_the_generator_reads():
    low = [derive_seed(0, "uniform", i) % 2**32 for i in range(4096)]
    bits = torch.tensor([[(value >> b) & 1 for b in range(32)] for value in low], dtype=torch.float64)
    assert (bits.mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / 64
    expected = hashlib.sha256(b'[0,"uniform",4095]').digest()
    assert low[-1] == (int.from_bytes(expected[:8], "big") >> 1) & 0xFFFFFFFF
