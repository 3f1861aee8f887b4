"""The algorithms, one file a stage: `python -m launch.dpo --help`."""
