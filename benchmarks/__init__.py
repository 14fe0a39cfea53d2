"""One file per question; run from the root of the repository: ``python -m benchmarks.step_time``."""
