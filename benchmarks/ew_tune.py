"""What do the noise multipliers that EW-Tune published guarantee, and how much noise is enough?

python -m benchmarks.ew_tune    # half a minute; keeps the result
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from hf_dp.cli.published_noise import recomputed

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Recompute, print, keep."""
    rows = [dataclasses.asdict(row) for row in recomputed()]
    for row in rows:
        print(
            f"{row['task']:6} delta {row['delta']:g}: claimed {row['claimed']:.2f}, "
            f"certified {row['certified']:.2f}; noise {row['edgeworth_noise']:.4f}, "
            f"PLD {row['pld_noise']:.4f}, PRV {row['prv_noise']:.4f}, RDP {row['rdp_noise']:.4f}"
        )
    text = json.dumps({"rows": rows}, indent=1)
    (RESULTS / "ew_tune.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
