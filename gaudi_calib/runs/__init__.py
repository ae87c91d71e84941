"""Runs, and commands over directories: a file is called as the command it implements.

run                       what the steps of a run share
options, configs, facts   what it is asked for, its QUANT_CONFIGs, what its manifest says of model and data
torch_steps, vllm_steps   the steps of either engine
conversion, rescale       what commands over directories share: writing, and the scales of another world
recipe                    how scales are made
sharing                   whether ranks hold whole experts
limits, convergence       what is said of ranges that make bad scales, and of data that has not settled them
"""
