"""What turns a clipped sum into a release."""

from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.gaussian import GaussianNoise

__all__ = ["GaussianNoise", "NoiseMechanism"]
