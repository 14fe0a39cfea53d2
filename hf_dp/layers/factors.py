"""One parameter's gradient, for every unit, in factored form: written out, as a product, or as rows.

Source:
    Bu et al. (2023), arXiv:2210.00038, for norms and sums from one backward pass.
"""

from hf_dp.layers.mat import Mat
from hf_dp.layers.one_hot import OneHot
from hf_dp.layers.per_unit import Factor, Total, Vec, combine, dense, sum_of, wide

__all__ = ["Factor", "Mat", "OneHot", "Total", "Vec", "combine", "dense", "sum_of", "wide"]
