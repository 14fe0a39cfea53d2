"""What LMO-DP's released code prints, reproduced to be compared with; no figure here is an epsilon.

Nothing that trains, plans or accounts imports this package (test:
test_no_figure_as_published_is_within_reach_of_training). Each figure is called a label, and stands
beside the epsilon that holds.

Source:
    LMO-DP, arXiv 2405.18776, of which we could consult the abstract, and the released code
    (github.com/yangqinue/noise). Corrections are welcome.
"""

from hf_dp.accounting.as_published.report import lmo_published

__all__ = ["lmo_published"]
