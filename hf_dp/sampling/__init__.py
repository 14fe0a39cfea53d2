"""Who is in a logical batch, and what that does to a release's event."""

from hf_dp.sampling.base import BatchSampler
from hf_dp.sampling.poisson import PoissonSampling

__all__ = ["BatchSampler", "PoissonSampling"]
