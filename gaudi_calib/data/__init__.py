"""Calibration data: rows of a dataset, prompts as token ids."""

# Of the sample that `prepare_prompts` takes; here, where the command line reads it without loading NumPy.
DEFAULT_SEED = 42
