"""Calibrate large language models for FP8 inference on Intel Gaudi 2 and 3."""

__version__ = "0.1.0"
