"""`gaudi-calib check`: every problem of a calibration, a run's or anybody's, with what mends it.

kinds     the short names of what can be found, and how bad each is
subject   what is looked at: one measurement of one directory, read once
path      from a path to a report
config    the QUANT_CONFIG and the place it names
files     manifest, files of every rank, their checksums and forms
nodes     the same nodes on every rank, and all that the model needs
ranges    values that make bad scales; too little data
outliers  ranks and layers unlike the others
scales    scales that do not follow from the ranges
explain   what they are instead
mend      `--fix`: what can be mended without a measurement

A check asks whoever owns the fact, and says what it got as a `Finding`; none works one out anew.
"""
