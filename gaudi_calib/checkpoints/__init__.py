"""Weights on disk.

checkpoint      a model's weights, read one by one
dequantize      weights stored as FP8 or MXFP4, and the bf16 values they stand for
plan            the nodes of a model, and the weights of each
fit             whether a checkpoint holds what its config.json calls for
head            which tensor counts as the output projection
weight_names    what checkpoints of different ages call a weight
expert_weights  the weights of a layer's routed experts
writer          writes the conversion of a checkpoint: streamed, compared, continued
gaudi2          the conversion for Gaudi 2
halving         its arithmetic
"""
