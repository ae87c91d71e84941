"""Scales from ranges: the methods of INC and the op rules that apply them.

compute      the scales of a rank
tensor       those of one tensor
optimal      `OPT` methods
rounding     scales that a device applies cheaply
precision    the arithmetic all of it runs in (`hp_dtype`)
cast         the FP8 cast
limits       ranges that make bad scales
compare      two sets of ranges or scales, number by number
convergence  ranges that the data has not settled
"""
