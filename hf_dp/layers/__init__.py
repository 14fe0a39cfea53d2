"""Layer rules: what each kind of layer adds to the per-unit gradient of its parameters."""

from hf_dp.layers.base import LayerRule, LayerRules
from hf_dp.layers.recognise import DEFAULT_LAYER_RULES, recognise

__all__ = ["DEFAULT_LAYER_RULES", "LayerRule", "LayerRules", "recognise"]
