"""EW-Tune's noise multipliers, recomputed: what was claimed for them, and what they guarantee.

Its accountant takes the first-order Edgeworth estimate for epsilon. Below, that search is repeated on
the settings of its four tasks, and each result is certified.

Source:
    Behnia, Ebrahimi, Pacheco and Padmanabhan (2022), "EW-Tune: A Framework for Privately Fine-Tuning
    Large Language Models with Differential Privacy", arXiv 2210.15042, its released program and
    training logs; `PRV` values are the baseline that it compares with, recomputed with prv_accountant
    0.2.0 (upper end, eps_error 0.1), Gopi, Lee and Wutschitz (2021), arXiv 2106.02848.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_dp.accounting._losses import SampledGaussian
from hf_dp.accounting.edgeworth.cumulants import of_sum
from hf_dp.accounting.edgeworth.series import estimated_epsilon
from hf_dp.accounting.pld import PLDAccountant
from hf_dp.accounting.rdp import RDPAccountant
from hf_dp.cli.run import PoissonRun

BATCH_SIZE = 2000
NUM_EPOCHS = 20
DELTAS = (1e-5, 1e-6)


@dataclass(frozen=True)
class Task:
    """One of the four data sets.

    Attributes:
        name: As in GLUE.
        num_examples: Training examples.
        recorded: The noise multiplier in the released training log, by delta, for epsilon 8; on a grid
            of 0.0005.
        prv: The noise that the PRV accountant's bound asks for, by delta.
    """

    name: str
    num_examples: int
    recorded: tuple[float, float]
    prv: tuple[float, float]

    @property
    def num_steps(self) -> int:
        """Steps of all epochs; the last, partial batch of an epoch is left out."""
        return NUM_EPOCHS * (self.num_examples // BATCH_SIZE)

    @property
    def sampling_probability(self) -> float:
        """That of Poisson sampling, which the accounting assumes (training shuffled)."""
        return BATCH_SIZE / self.num_examples


TASKS = (
    Task("MNLI", 392_702, (0.557, 0.573), (0.5807, 0.6068)),
    Task("QQP", 363_849, (0.5635, 0.580), (0.5869, 0.6135)),
    Task("QNLI", 104_743, (0.711, 0.7395), (0.7294, 0.7680)),
    Task("SST-2", 67_349, (0.7865, 0.8215), (0.8025, 0.8484)),
)
CLAIMED = 8.0


@dataclass(frozen=True)
class Recomputed:
    """One task at one delta.

    Attributes:
        task: Its name.
        delta: Of the guarantee.
        claimed: Epsilon that was claimed.
        certified: Proven upper bound on epsilon at `recorded_noise`.
        recorded_noise: From the released training logs.
        edgeworth_noise: What the first-order estimate asks for, recomputed.
        pld_noise: What the claimed epsilon takes, certified by accountant "pld".
        prv_noise: What the PRV accountant's bound asks for (recorded).
        rdp_noise: What accountant "rdp" asks for.
        claimed_saving: Noise saved by the estimate against PRV: it is not private.
        real_saving: Noise saved by PLD against PRV.
        real_saving_to_rdp: Noise saved by PLD against RDP.
    """

    task: str
    delta: float
    claimed: float
    certified: float
    recorded_noise: float
    edgeworth_noise: float
    pld_noise: float
    prv_noise: float
    rdp_noise: float
    claimed_saving: float
    real_saving: float
    real_saving_to_rdp: float


def recomputed(epsilon: float = CLAIMED) -> Iterator[Recomputed]:
    """Every task at both deltas, one after another.

    Args:
        epsilon: The target; PRV's and the recorded noise are those for 8 whatever it is.
    """
    for task in TASKS:
        for index, delta in enumerate(DELTAS):
            yield _row(task, index, delta, epsilon)


def estimated_noise(task: Task, epsilon: float, delta: float) -> float:
    """The noise multiplier at which the first-order estimate is `epsilon`: what EW-Tune trained with."""
    from scipy.optimize import brentq

    def excess(noise: float) -> float:
        releases = {SampledGaussian(task.sampling_probability, noise): task.num_steps}
        large, small = (of_sum(releases, "remove", large=world) for world in (True, False))
        found = estimated_epsilon(large, small, delta, order=1)
        return (0.0 if found is None else found) - epsilon

    return float(brentq(excess, 0.3, 4.0, xtol=1e-7))


def _row(task: Task, index: int, delta: float, epsilon: float) -> Recomputed:
    run = PoissonRun(task.sampling_probability, task.num_steps)
    noise = estimated_noise(task, epsilon, delta)
    pld, rdp = (
        accountant.calibrate(run, target_epsilon=epsilon, target_delta=delta).noise_multiplier
        for accountant in (PLDAccountant(), RDPAccountant())
    )
    used = run.with_noise_multiplier(task.recorded[index])
    certified = PLDAccountant().guarantee(used.event(), delta=delta)
    prv = task.prv[index]
    return Recomputed(
        task=task.name,
        delta=delta,
        claimed=epsilon,
        certified=certified.epsilon,
        recorded_noise=task.recorded[index],
        edgeworth_noise=noise,
        pld_noise=pld,
        prv_noise=prv,
        rdp_noise=rdp,
        claimed_saving=1 - noise / prv,
        real_saving=1 - pld / prv,
        real_saving_to_rdp=1 - pld / rdp,
    )
