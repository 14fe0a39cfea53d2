"""Randomness comes from the operating system, has no seed, and leaves global generators alone."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp import coins as coins_module
from hf_dp.coins import Coins, FixedCoins, SecretCoins

FALSE_ALARM = 1e-6  # of each statistical test below


def fixed(seed: int = 0) -> FixedCoins:
    return FixedCoins(torch.Generator().manual_seed(seed))


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def global_draws() -> tuple[Any, ...]:
    drawn = np.random.rand(2).tolist()  # noqa: NPY002
    return random.random(), tuple(drawn), tuple(torch.rand(2).tolist())


# ---- secret ------------------------------------------------------------------------------------


def test_secret_coins_ignore_every_seed() -> None:
    drawn = []
    for _ in range(2):
        seed_everything()
        coins = SecretCoins()
        drawn.append((coins.bits(4).tolist(), coins.normal_like(torch.zeros(4)).tolist()))
    (bits, normals), (other_bits, other_normals) = drawn
    assert not set(bits) & set(other_bits)
    assert not set(normals) & set(other_normals)


def test_secret_coins_leave_the_global_generators_alone() -> None:
    seed_everything()
    expected = global_draws()
    seed_everything()
    SecretCoins().bits(10)
    SecretCoins().normal_like(torch.zeros(10))
    assert global_draws() == expected


def test_secret_coins_have_no_state_to_save() -> None:
    assert vars(SecretCoins()) == {}
    assert SecretCoins.is_secret
    assert not FixedCoins.is_secret


def test_bits_are_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    expected = [int.from_bytes(range(start, start + 8), "little") for start in (0, 8, 16)]
    assert SecretCoins().bits(3).tolist() == expected


@pytest.mark.parametrize("coins", [SecretCoins(), fixed()])
@pytest.mark.statistical
def test_every_bit_is_fair(coins: Coins) -> None:
    count = 50_000
    drawn = coins.bits(count)
    assert drawn.dtype == np.uint64
    assert drawn.shape == (count,)
    bits = (drawn[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    low, high = stats.binom.ppf([FALSE_ALARM / 128, 1 - FALSE_ALARM / 128], count, 0.5)
    assert low <= bits.sum(0).min()
    assert bits.sum(0).max() <= high


@pytest.mark.parametrize("coins", [SecretCoins(), fixed()])
def test_no_bits_can_be_asked_for(coins: Coins) -> None:
    assert coins.bits(0).shape == (0,)


# ---- normal draws --------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", [SecretCoins(), fixed()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4)])
def test_normal_draws_look_like_the_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, coins: Coins
) -> None:
    like = torch.full(shape, 5.0, dtype=dtype)
    drawn = coins.normal_like(like)
    assert (drawn.shape, drawn.dtype, drawn.device) == (like.shape, dtype, like.device)
    assert dtype is torch.float32 or drawn.unique().numel() == drawn.numel()
    assert bool((like == 5).all())


def test_draws_in_blocks_are_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dp.coins._BLOCK", 5)
    drawn = SecretCoins().normal_like(torch.zeros(13, dtype=torch.float64))
    assert drawn.unique().numel() == 13


def looks_normal(drawn: np.ndarray) -> bool:
    """Equally likely bins by chi-square, and the counts beyond 4 and 5 standard deviations."""
    cells = np.bincount((stats.norm.cdf(drawn) * 200).astype(int).clip(0, 199), minlength=200)
    expected = len(drawn) / 200
    fits = stats.chi2.sf(((cells - expected) ** 2).sum() / expected, 199) > FALSE_ALARM / 3
    tails = [
        stats.binomtest(int((np.abs(drawn) > z).sum()), len(drawn), 2 * stats.norm.sf(z)).pvalue
        for z in (4, 5)
    ]
    return bool(fits and min(tails) > FALSE_ALARM / 3)


@pytest.mark.statistical
def test_secret_draws_are_normal_in_body_and_tail() -> None:
    assert looks_normal(SecretCoins().normal_like(torch.zeros(2_000_000)).numpy())


@pytest.mark.statistical
def test_draws_that_are_only_nearly_normal_are_seen() -> None:
    generator = np.random.default_rng(0)
    twelve = generator.random((500_000, 12), dtype=np.float32).sum(1) - 6
    assert not looks_normal(twelve)
    body = generator.standard_normal(2_000_000)
    assert not looks_normal(body.clip(-4, 4))
    assert not looks_normal(body * 1.02)


def test_the_tail_reaches_beyond_eight_deviations_and_never_to_infinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lowest, highest = (1 << 63).to_bytes(8, "little"), ((1 << 63) - 1).to_bytes(8, "little")
    for word in (lowest, highest):
        monkeypatch.setattr(
            coins_module, "_secret_bytes", lambda count, word=word: bytearray(word * (count // 8))
        )
        drawn = SecretCoins().normal_like(torch.zeros(4, dtype=torch.float64))
        assert bool(torch.isfinite(drawn).all())
        if word == lowest:
            assert 8 < float(drawn.abs().max()) < 9


def test_every_draw_of_noise_is_keyed_anew_by_the_operating_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(os, "urandom", lambda count: bytes([7]) * count)
    monkeypatch.setattr(coins_module.ssl, "RAND_add", lambda key, bits: events.append((key, bits)))
    drawn = coins_module.ssl.RAND_bytes
    monkeypatch.setattr(
        coins_module.ssl, "RAND_bytes", lambda count: events.append(count) or drawn(count)
    )
    monkeypatch.setattr(coins_module, "_BLOCK", 8)
    SecretCoins().normal_like(torch.zeros(12))
    key = (bytes([7]) * 48, 48.0)
    assert events == [key, 64, key, 32]


@pytest.mark.statistical
def test_without_openssl_the_operating_system_gives_every_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coins_module, "ssl", None)
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or real(count))
    drawn = SecretCoins().normal_like(torch.zeros(400_000))
    assert sum(asked) == 8 * 400_000
    assert looks_normal(drawn.numpy())


# ---- uniform draws -------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize("coins", [SecretCoins(), fixed()])
@pytest.mark.statistical
def test_signed_uniforms_are_uniform_down_to_the_last_bit(coins: Coins) -> None:
    drawn = coins.signed_uniforms(200_000, CPU)
    assert (drawn.shape, drawn.dtype) == ((200_000,), torch.float64)
    assert stats.kstest(drawn.numpy(), stats.uniform(-1, 2).cdf).pvalue > FALSE_ALARM / 2
    cells = (drawn * 2.0**52 - 0.5).numpy()
    assert (cells == np.rint(cells)).all()
    bits = (cells.astype(np.int64)[:, None] >> np.arange(52)) & 1
    low, high = stats.binom.ppf([FALSE_ALARM / 208, 1 - FALSE_ALARM / 208], len(drawn), 0.5)
    assert low <= bits.sum(0).min() <= bits.sum(0).max() <= high
    assert coins.signed_uniforms(0, CPU).shape == (0,)


@pytest.mark.parametrize("word", [-(1 << 63), (1 << 63) - 1, 0, -1])
def test_signed_uniforms_never_are_zero_or_one(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    word_bytes = word.to_bytes(8, "little", signed=True)
    monkeypatch.setattr(coins_module, "_secret_bytes", lambda _: bytearray(word_bytes))
    drawn = float(SecretCoins().signed_uniforms(1, CPU))
    assert 2.0**-53 <= abs(drawn) <= 1 - 2.0**-53
    assert (drawn < 0) == (word < 0)


def test_signed_uniforms_ignore_every_seed_and_fixed_ones_repeat() -> None:
    drawn = []
    for _ in range(2):
        seed_everything()
        before = torch.get_rng_state()
        drawn.append(SecretCoins().signed_uniforms(4, CPU).tolist())
        assert torch.equal(torch.get_rng_state(), before)
    assert not set(drawn[0]) & set(drawn[1])
    assert torch.equal(fixed(3).signed_uniforms(5, CPU), fixed(3).signed_uniforms(5, CPU))


# ---- fixed -----------------------------------------------------------------------------------------


def test_fixed_coins_repeat() -> None:
    for _ in range(2):
        one, other = fixed(3), fixed(3)
        assert one.bits(5).tolist() == other.bits(5).tolist()
        assert torch.equal(one.normal_like(torch.zeros(5)), other.normal_like(torch.zeros(5)))
        assert one.bits(5).tolist() == other.bits(5).tolist()
    assert fixed(3).bits(5).tolist() != fixed(4).bits(5).tolist()


# ---- library code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coins", [SecretCoins(), fixed()])
@pytest.mark.parametrize("fails", [False, True])
def test_library_code_leaves_the_global_generators_as_they_were(coins: Coins, fails: bool) -> None:
    seed_everything()
    global_draws()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    try:
        with coins.for_library_code():
            global_draws()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_library_code_on_secret_coins_ignores_every_seed() -> None:
    seen = []
    for _ in range(2):
        seed_everything()
        with SecretCoins().for_library_code():
            seen.append(global_draws())
    seed_everything()
    seen.append(global_draws())
    for part in zip(*seen, strict=True):
        assert len(set(part)) == 3


def test_library_code_may_seed_for_itself() -> None:
    seed_everything(1)
    expected = global_draws()
    seed_everything(1)
    with SecretCoins().for_library_code():
        seed_everything(2)
        global_draws()
    assert global_draws() == expected


def test_library_code_on_fixed_coins_repeats_and_goes_on() -> None:
    def twice(coins: Coins) -> list[Any]:
        seen = []
        for _ in range(2):
            with coins.for_library_code():
                seen.append(global_draws())
        return seen

    assert twice(fixed(5)) == twice(fixed(5))
    first, second = twice(fixed(5))
    assert first != second


def test_a_generator_that_ran_on_a_seed_would_be_seen() -> None:
    """Planted: noise from torch's global generator, as other libraries have it."""

    class Seeded(SecretCoins):
        def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn_like(tensor)

    drawn = []
    for _ in range(2):
        seed_everything()
        drawn.append(Seeded().normal_like(torch.zeros(4)).tolist())
    assert drawn[0] == drawn[1]
    assert not math.isnan(drawn[0][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_draws_on_an_accelerator_are_keyed_anew_each_time() -> None:
    like = torch.zeros(1000, device="cuda")
    torch.manual_seed(0)
    one = SecretCoins().normal_like(like)
    torch.manual_seed(0)
    other = SecretCoins().normal_like(like)
    assert one.device.type == "cuda"
    assert float((one == other).float().mean()) < 1e-2
    torch.manual_seed(0)
    signed = SecretCoins().signed_uniforms(1000, like.device)
    torch.manual_seed(0)
    assert signed.device.type == "cuda"
    assert signed.dtype is torch.float64
    assert not bool((signed == SecretCoins().signed_uniforms(1000, like.device)).any())
