"""Calibration data: rows of a dataset, prompts as token ids."""
