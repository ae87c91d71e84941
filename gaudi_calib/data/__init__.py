"""Calibration data: from datasets to prompts as token ids.

prompts         the call that does it all
sources, rows   read a dataset
pickles         pickled tables, without running their code
mixture         one of several
tokens          tokenize a row
bad_rows        counts those that cannot be used
"""

# Of the sample that `prepare_prompts` takes; here, where the command line reads it without loading NumPy.
DEFAULT_SEED = 42
