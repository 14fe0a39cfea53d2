"""How much of each unit's gradient enters the sum."""

from hf_dp.clipping.base import ClippingPolicy
from hf_dp.clipping.flat import FlatClipping
from hf_dp.clipping.loss import LossRelease

__all__ = ["ClippingPolicy", "FlatClipping", "LossRelease"]
