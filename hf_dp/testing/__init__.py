"""Checks for your own tests: a layer rule, a model's clipping, a mechanism's noise."""

from hf_dp.testing.check_layer_rule import check_layer_rule
from hf_dp.testing.check_mechanism import check_mechanism
from hf_dp.testing.check_model import check_model
from hf_dp.testing.disagreement import DisagreementError

__all__ = ["DisagreementError", "check_layer_rule", "check_mechanism", "check_model"]
