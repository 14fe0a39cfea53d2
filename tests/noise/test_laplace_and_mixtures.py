"""Laplace noise and its mixtures: the law that is accounted for, on every coordinate, drawn anew."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hf_dp.coins import Coins, FixedCoins, SecretCoins
from hf_dp.errors import ConfigurationError
from hf_dp.events import Laplace, ScaleMixtureLaplace
from hf_dp.noise import LaplaceNoise, NoiseMechanism, ScaleMixtureNoise, draws, scale_mixture
from hf_dp.scale_law import ScaleLaw
from hf_dp.sums import ClippedSum, NoisySum

FALSE_ALARM = 1e-6  # of each statistical check below
SHAPES = {"table": (300, 400), "bias": (77,), "gain": (1,), "scale": (), "nothing": (0, 3)}
COORDINATES = 300 * 400 + 77 + 1 + 1 + 1

LOMAX = ScaleLaw(3.0, 1 / 3)
PUBLISHED = ScaleLaw(1.0, 0.05, 0.5, 0.1, 0.2)  # labelled 0.3, as drawn by the published sampler
AS_A_RATE = ScaleLaw(1.0, 0.05, 0.02, 0.1, 0.2)  # the same set, as read by its accountant
LAWS = {
    "gamma": LOMAX,
    "gamma of shape 40": ScaleLaw(40.0, 0.02),
    "published": PUBLISHED,
    "published, other reading": AS_A_RATE,
    "small gamma": ScaleLaw(0.4, 0.5, 0.0, 0.3, 0.3),
    "uniform": ScaleLaw(uniform_low=0.5, uniform_high=3.0),
    "constant": ScaleLaw(uniform_low=2.0, uniform_high=2.0),
    "gamma and exponential": ScaleLaw(2.5, 0.2, 0.4),
}
MECHANISMS: dict[str, NoiseMechanism] = {
    "laplace": LaplaceNoise(1.3),
    **{name: ScaleMixtureNoise(law) for name, law in LAWS.items()},
}


def nothing(dtype: torch.dtype = torch.float64, *, loss: bool = True) -> ClippedSum:
    grads = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    empty = torch.zeros(0)
    return ClippedSum(grads, empty, empty, torch.zeros((), dtype=dtype) if loss else None)


def flat(released: NoisySum) -> np.ndarray:
    parts = [*released.grads.values(), *([] if released.loss_sum is None else [released.loss_sum])]
    return torch.cat([part.reshape(-1).double() for part in parts]).numpy()


def noise(
    mechanism: NoiseMechanism,
    sensitivity: float = 1.0,
    coins: Coins | None = None,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    summed, coins = nothing(dtype), coins or SecretCoins()
    return flat(mechanism.release(summed, sensitivity=sensitivity, coins=coins))


def size_cdf(event: Any, x: np.ndarray) -> np.ndarray:
    """P(abs(Z) <= x), written down anew for what the event says."""
    if isinstance(event, Laplace):
        return stats.expon(scale=event.noise_multiplier / math.sqrt(2)).cdf(x)
    width = event.uniform_high - event.uniform_low
    uniform = np.exp(-event.uniform_low * x)
    if width:
        uniform = uniform * np.where(
            x > 0, -np.expm1(-width * x) / np.maximum(width * x, 1e-300), 1
        )
    gamma = (1 + event.gamma_scale * x) ** -event.gamma_shape
    return np.asarray(1 - gamma * uniform / (1 + event.exponential_mean * x))


def has_the_law(drawn: np.ndarray, event: Any) -> bool:
    """Kolmogorov-Smirnov on the sizes and on the signed values; the far tail by its count."""
    far = 0.9995
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if size_cdf(event, np.array(middle)) < far else (low, middle)
    beyond = int((np.abs(drawn) > high).sum())
    p_values = [
        stats.kstest(np.abs(drawn), lambda x: size_cdf(event, x)).pvalue,
        stats.kstest(drawn, lambda z: 0.5 + 0.5 * np.sign(z) * size_cdf(event, np.abs(z))).pvalue,
        stats.binomtest(beyond, len(drawn), 1 - far).pvalue,
    ]
    return bool(min(p_values) > FALSE_ALARM / 3)


def unrelated(one: np.ndarray, other: np.ndarray) -> bool:
    """Rank correlation of sizes, which heavy tails cannot spoil."""
    z = stats.spearmanr(np.abs(one), np.abs(other)).statistic * math.sqrt(len(one) - 1)
    return bool(abs(z) < stats.norm.isf(FALSE_ALARM / 2))


# ---- the law ---------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("name", MECHANISMS)
def test_noise_has_the_law_of_its_event(name: str) -> None:
    mechanism = MECHANISMS[name]
    drawn = noise(mechanism, sensitivity=2.5) / 2.5
    assert len(drawn) == COORDINATES
    assert has_the_law(drawn, mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_the_law_is_the_same_in_float32_and_on_fixed_coins(name: str) -> None:
    mechanism = MECHANISMS[name]
    assert has_the_law(noise(mechanism, dtype=torch.float32), mechanism.event())
    coins = FixedCoins(torch.Generator().manual_seed(7))
    assert has_the_law(noise(mechanism, coins=coins), mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize(
    "mechanism",
    [LaplaceNoise(0.5), ScaleMixtureNoise(PUBLISHED), ScaleMixtureNoise(PUBLISHED, "shared")],
    ids=lambda mechanism: type(mechanism).__name__,
)
def test_the_loss_has_that_law_too(mechanism: NoiseMechanism) -> None:
    coins, losses = SecretCoins(), []
    for _ in range(1500):
        loss = torch.zeros((), dtype=torch.float64)
        summed = ClippedSum({"bias": torch.zeros(2)}, torch.zeros(0), torch.zeros(0), loss)
        losses.append(mechanism.release(summed, sensitivity=3.0, coins=coins).loss_sum)
    drawn = torch.stack([loss for loss in losses if loss is not None]).numpy() / 3
    assert has_the_law(drawn, mechanism.event())


@pytest.mark.statistical
@pytest.mark.parametrize("shape", [0.3, 1.0, 1.5, 7.0, 3000.0])
def test_gamma_draws_are_gamma(shape: float) -> None:
    drawn = draws.gamma(shape, 100_000, torch.device("cpu"), SecretCoins()).numpy()
    assert stats.kstest(drawn, stats.gamma(shape).cdf).pvalue > FALSE_ALARM


@pytest.mark.statistical
def test_the_closed_form_of_a_gamma_part_alone_is_the_general_one() -> None:
    """A part so small that it changes nothing sends the draws through the general route."""
    general = dataclasses.replace(LOMAX, uniform_high=1e-12)
    drawn = noise(ScaleMixtureNoise(general))
    assert has_the_law(drawn, ScaleMixtureNoise(LOMAX).event())


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "published", "gamma of shape 40"])
def test_the_deviation_is_the_noise_multiplier(name: str) -> None:
    mechanism = MECHANISMS[name]
    drawn = np.concatenate([noise(mechanism) for _ in range(5)])
    # Batches of a heavy-tailed law: the middle of many estimates, within 3 %.
    estimates = [part.std() for part in np.array_split(drawn, 20)]
    assert np.median(estimates) == pytest.approx(mechanism.noise_multiplier, rel=0.03)


# ---- planted faults ----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("drawn_by", "accounted"),
    [
        (ScaleMixtureNoise(PUBLISHED), ScaleMixtureNoise(AS_A_RATE)),  # a rate read as a mean
        (ScaleMixtureNoise(AS_A_RATE), ScaleMixtureNoise(PUBLISHED)),
        (LaplaceNoise(1.3 * math.sqrt(2)), LaplaceNoise(1.3)),  # deviation drawn as scale
        (LaplaceNoise(1.3 / math.sqrt(2)), LaplaceNoise(1.3)),
        (LaplaceNoise(1.3 * 1.05), LaplaceNoise(1.3)),
        (LaplaceNoise(1.3 * 0.95), LaplaceNoise(1.3)),
        (ScaleMixtureNoise(PUBLISHED.scaled(1.05)), ScaleMixtureNoise(PUBLISHED)),
        (ScaleMixtureNoise(LOMAX.scaled(0.95)), ScaleMixtureNoise(LOMAX)),
        (ScaleMixtureNoise(LOMAX, "shared"), ScaleMixtureNoise(LOMAX)),
    ],
)
def test_noise_of_another_law_is_seen(drawn_by: NoiseMechanism, accounted: NoiseMechanism) -> None:
    assert not has_the_law(noise(drawn_by), accounted.event())


@pytest.mark.statistical
def test_a_tail_that_is_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = scale_mixture.laplace_of_drawn_scale

    def cut(*args: Any) -> Tensor:
        return real(*args).clamp_(-34, 34)  # which 5e-4 of all draws should be beyond

    monkeypatch.setattr(scale_mixture, "laplace_of_drawn_scale", cut)
    assert not has_the_law(noise(ScaleMixtureNoise(LOMAX)), ScaleMixtureNoise(LOMAX).event())


class Unsigned(SecretCoins):
    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        return super().signed_uniforms(count, device).abs_()


class FewBits(SecretCoins):
    """24-bit uniforms, as float32 has them."""

    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        drawn = super().signed_uniforms(count, device)
        return (drawn.abs() * 2**24).ceil_().div_(2**24).copysign_(drawn)


class SameEveryTime(SecretCoins):
    def signed_uniforms(self, count: int, device: torch.device) -> Tensor:
        return FixedCoins(torch.Generator().manual_seed(1)).signed_uniforms(count, device)


@pytest.mark.statistical
def test_planted_coins_are_seen() -> None:
    mechanism = LaplaceNoise(1.3)
    assert not has_the_law(noise(mechanism, coins=Unsigned()), mechanism.event())
    few = noise(mechanism, coins=FewBits())
    assert len(np.unique(few)) < len(few)
    same = [noise(mechanism, coins=SameEveryTime()) for _ in range(2)]
    assert not unrelated(*same)


# ---- every coordinate, anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["iid", "shared"])
@pytest.mark.parametrize("law", [LOMAX, PUBLISHED], ids=["gamma", "published"])
def test_every_coordinate_gets_a_draw_of_its_own(law: ScaleLaw, draw: Any) -> None:
    for mechanism in (LaplaceNoise(1.0), ScaleMixtureNoise(law, draw)):
        drawn = np.concatenate([noise(mechanism), noise(mechanism)])
        assert len(np.unique(drawn)) == 2 * COORDINATES
        assert (drawn != 0).all()


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_coordinates_and_releases_are_independent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 1000)  # many blocks: none repeats the one before
    one, other = noise(MECHANISMS[name]), noise(MECHANISMS[name])
    assert unrelated(one, other)
    for lag in (1, 2, 400, 500, 1000, len(one) // 2):
        assert unrelated(one[lag:], one[:-lag]), lag


@pytest.mark.statistical
def test_one_scale_is_shared_by_a_release_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_BLOCK", 3)
    wide = ScaleLaw(0.3, 2.0, 0.0, 0.02, 0.02)  # so that sharing shows, by 12 deviations and more
    mechanism, coins = ScaleMixtureNoise(wide, "shared"), SecretCoins()

    def sizes(mechanism: NoiseMechanism) -> np.ndarray:
        rows = []
        for _ in range(1000):
            grads = {name: torch.zeros(4, dtype=torch.float64) for name in ("one", "other")}
            loss = torch.zeros((), dtype=torch.float64)
            summed = ClippedSum(grads, torch.zeros(0), torch.zeros(0), loss)
            rows.append(flat(mechanism.release(summed, sensitivity=1.0, coins=coins)))
        return np.abs(np.stack(rows))

    shared, iid = sizes(mechanism), sizes(dataclasses.replace(mechanism, draw="iid"))
    for place in range(1, 9):  # in the same block, another block, another tensor, the loss
        assert not unrelated(shared[:, 0], shared[:, place])
        assert unrelated(iid[:, 0], iid[:, place])
    assert unrelated(shared[1:, 0], shared[:-1, 0])
    assert has_the_law(shared[:, 3] * np.sign(np.arange(1000) % 2 - 0.5), mechanism.event())


@pytest.mark.statistical
def test_given_its_scale_a_shared_release_is_plain_laplace_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        scale_mixture, "inverse_scales", lambda *_: torch.tensor([0.25], dtype=torch.float64)
    )
    drawn = noise(ScaleMixtureNoise(LOMAX, "shared"), sensitivity=3.0) / 3
    assert has_the_law(drawn, Laplace(4 * math.sqrt(2)))


def test_noise_ignores_every_seed_and_fixed_coins_repeat() -> None:
    def run(mechanism: NoiseMechanism, coins: Coins | None = None) -> np.ndarray:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return noise(mechanism, coins=coins)

    for mechanism in MECHANISMS.values():
        assert not set(run(mechanism)) & set(run(mechanism))
        one, again, other = (
            run(mechanism, FixedCoins(torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
        )
        assert (one == again).all()
        assert (one != other).all()


@pytest.mark.parametrize("name", ["laplace", "gamma", "published"])
def test_the_sum_is_kept_whatever_its_layout(name: str) -> None:
    grads = {
        "rows": torch.full((30, 40), 1000.0),
        "columns": torch.full((40, 30), 1000.0).t(),
        "number": torch.tensor(1000.0),
    }
    summed = ClippedSum(grads, torch.zeros(0), torch.zeros(0), torch.tensor(1000.0))
    released = MECHANISMS[name].release(summed, sensitivity=1e-4, coins=SecretCoins())
    shapes = [tuple(grad.shape) for grad in released.grads.values()]
    assert shapes == [(30, 40), (30, 40), ()]
    drawn = flat(released) - 1000
    assert (np.abs(drawn) < 1).all()
    assert (drawn != 0).mean() > 0.5
    assert released.grads["columns"].std() > 0


def test_without_a_loss_none_is_released() -> None:
    for mechanism in MECHANISMS.values():
        summed = nothing(loss=False)
        assert mechanism.release(summed, sensitivity=1.0, coins=SecretCoins()).loss_sum is None


# ---- what is accounted ----------------------------------------------------------------------------------


def test_the_event_is_that_of_the_fields() -> None:
    assert LaplaceNoise(1.7).event() == Laplace(1.7, "l1", None)
    assert LaplaceNoise(1.7, "l2", 8).event() == Laplace(1.7, "l2", 8)
    assert ScaleMixtureNoise(PUBLISHED, "shared", "l2", 8).event() == ScaleMixtureLaplace(
        1.0, 0.05, 0.5, 0.1, 0.2, "shared", "l2", 8
    )
    assert ScaleMixtureNoise(PUBLISHED).event().law == PUBLISHED


def test_a_size_can_be_chosen() -> None:
    assert LaplaceNoise(1.7, "l2", 8).with_noise_multiplier(3.0) == LaplaceNoise(3.0, "l2", 8)
    chosen = ScaleMixtureNoise(PUBLISHED, "shared", "l2", 8).with_noise_multiplier(3.0)
    assert chosen.noise_multiplier == pytest.approx(3.0, rel=1e-12)
    assert (chosen.draw, chosen.norm, chosen.dimension) == ("shared", "l2", 8)
    ratio = chosen.law.gamma_scale / PUBLISHED.gamma_scale
    assert chosen.law.uniform_high / PUBLISHED.uniform_high == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("make", [LaplaceNoise, ScaleMixtureNoise])
def test_more_coordinates_than_are_accounted_for_are_refused(make: Any) -> None:
    size = 1.0 if make is LaplaceNoise else LOMAX
    enough = make(size, dimension=COORDINATES)
    enough.release(nothing(), sensitivity=1.0, coins=SecretCoins())
    make(size, dimension=COORDINATES - 1).release(
        nothing(loss=False), sensitivity=1.0, coins=SecretCoins()
    )
    summed = nothing()
    with pytest.raises(
        ConfigurationError, match=rf"Noise\.dimension={COORDINATES - 1}: .*{COORDINATES} coord"
    ):
        make(size, dimension=COORDINATES - 1).release(summed, sensitivity=1.0, coins=SecretCoins())
    assert not any(bool(grad.any()) for grad in summed.grads.values())


@pytest.mark.parametrize(
    "law",
    [
        ScaleLaw(2.0, 1.0),
        ScaleLaw(exponential_mean=1.0),
        ScaleLaw(uniform_high=1.0),
        ScaleLaw(0.9, 1.0, 1.0),
    ],
    ids=repr,
)
def test_noise_without_a_variance_is_refused(law: ScaleLaw) -> None:
    with pytest.raises(ConfigurationError, match=r"ScaleMixtureNoise\.law=.*variance.*above 2"):
        ScaleMixtureNoise(law)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, None, "1", True])
def test_noise_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Laplace\.noise_multiplier=.*> 0"):
        LaplaceNoise(value)


def test_unknown_norms_and_draws_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Laplace\.norm='l0'"):
        LaplaceNoise(1.0, "l0")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"ScaleMixtureLaplace\.draw='each'"):
        ScaleMixtureNoise(LOMAX, "each")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.statistical
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["laplace", "gamma", "published", "small gamma"])
def test_on_an_accelerator_noise_has_that_law_too(name: str) -> None:
    mechanism, like = MECHANISMS[name], torch.zeros(500_000, device="cuda")
    summed = ClippedSum({"all": like}, torch.zeros(0), torch.zeros(0))
    torch.manual_seed(0)
    released = mechanism.release(summed, sensitivity=1.0, coins=SecretCoins())
    assert released.grads["all"].device.type == "cuda"
    assert has_the_law(released.grads["all"].cpu().double().numpy(), mechanism.event())
