"""Who is in a logical batch, and what that does to a release's event."""

from hf_dp.sampling.balls_in_bins import BallsInBinsSampling
from hf_dp.sampling.base import BatchSampler
from hf_dp.sampling.by_user import ContributionSampling, UserSampling
from hf_dp.sampling.fixed_size import FixedSizeSampling
from hf_dp.sampling.poisson import PoissonSampling
from hf_dp.sampling.shuffled import ShuffledSampling
from hf_dp.sampling.truncated import TruncatedPoissonSampling
from hf_dp.sampling.users import Users

__all__ = [
    "BallsInBinsSampling",
    "BatchSampler",
    "ContributionSampling",
    "FixedSizeSampling",
    "PoissonSampling",
    "ShuffledSampling",
    "TruncatedPoissonSampling",
    "UserSampling",
    "Users",
]
