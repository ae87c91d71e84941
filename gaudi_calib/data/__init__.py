"""Calibration data: from datasets to prompts as token ids.

`sources` and `rows` read a dataset, `mixture` makes one of several, `tokens` tokenizes a row, `bad_rows` counts
those that cannot be used, and `prompts` has the call that does it all.
"""

# Of the sample that `prepare_prompts` takes; here, where the command line reads it without loading NumPy.
DEFAULT_SEED = 42
