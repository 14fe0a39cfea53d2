"""What one step released, as frozen data.

A mechanism and a sampler *emit* events, the ledger *stores* them, an accountant *reads* them; none of
the three needs to know another. Rules of evolution: never remove an event, never change the meaning
of a field, new fields are optional. The names follow dp-accounting's ``DpEvent``s, to which those
that it has can be converted (``hf_dp.accounting.dp_events``), so that a ledger can be replayed there.
"""

from hf_dp.events.json_form import (
    EVENT_TYPES,
    from_json,
    to_json,
)
from hf_dp.events.mechanisms import (
    Gaussian,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    Norm,
    PrivacyEvent,
    PrivacyUnit,
    ScaleDraw,
    ScaleMixtureLaplace,
)
from hf_dp.events.sampled import (
    BallsInBins,
    Composed,
    Continued,
    PoissonSampled,
    PoissonSampledContributions,
    SampledWithoutReplacement,
    SelfComposed,
    Shuffled,
    TruncatedPoissonSampled,
)

__all__ = [
    "EVENT_TYPES",
    "BallsInBins",
    "Composed",
    "Continued",
    "Gaussian",
    "Laplace",
    "NeighboringRelation",
    "NonPrivate",
    "Norm",
    "PoissonSampled",
    "PoissonSampledContributions",
    "PrivacyEvent",
    "PrivacyUnit",
    "SampledWithoutReplacement",
    "ScaleDraw",
    "ScaleMixtureLaplace",
    "SelfComposed",
    "Shuffled",
    "TruncatedPoissonSampled",
    "from_json",
    "to_json",
]
