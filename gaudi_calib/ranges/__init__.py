"""Ranges as NumPy values; no file is read or written here.

node, layer_types   one measured module; what it computes, and the class of its module in vLLM
table               all nodes of a rank as flat arrays
idle                modules that never run
sources             which of a node's ranges scales come from; nobody reads the others
bf16                rounding to bfloat16
topology, channels  how ranks share a model; a whole model's ranges per channel
derive              what each rank of a topology sees of them
experts             where a rank's experts are, and which of them another rank gets
unify, merge        ranks into fewer or more ranks; several runs into one
kvcache             cache ranges into the attention matmuls
coverage            how many tokens each expert saw
progress, convergence  which samples raised the maximum of a tensor; of all that scales come from
"""
