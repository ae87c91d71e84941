"""Ranges as NumPy values: nodes, their file form, slicing and merging over ranks."""
