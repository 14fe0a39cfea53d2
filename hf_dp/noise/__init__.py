"""What turns a clipped sum into a release."""

from hf_dp.noise.base import NoiseMechanism
from hf_dp.noise.gaussian import GaussianNoise
from hf_dp.noise.laplace import LaplaceNoise
from hf_dp.noise.scale_mixture import ScaleMixtureNoise
from hf_dp.noise.search import NoiseSearch, search_noise

__all__ = [
    "GaussianNoise",
    "LaplaceNoise",
    "NoiseMechanism",
    "NoiseSearch",
    "ScaleMixtureNoise",
    "search_noise",
]
