"""Checks for your own tests: is a layer rule right, and is a model clipped example by example."""

from hf_dp.testing.check_layer_rule import check_layer_rule
from hf_dp.testing.check_model import check_model
from hf_dp.testing.disagreement import DisagreementError

__all__ = ["DisagreementError", "check_layer_rule", "check_model"]
