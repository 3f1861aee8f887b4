"""Faults planted in real runs, and what comes of them: `python -m benchmarks.faultdrill --help`."""
