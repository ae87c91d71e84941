"""What both engines share.

peak         the largest magnitude of a tensor
attention    what an attention layer has seen, and its softmax
nodes        from that to the ranges of its nodes
fp8_cast     the FP8 cast of the devices
"""
