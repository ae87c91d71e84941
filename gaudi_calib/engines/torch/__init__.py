"""The torch engine: Hugging Face modules, the weights of one layer in memory at a time.

stream       runs a model layer by layer, and knows nothing of ranges
skeleton     the model without weights, and what gives it some for a while
sequences    those of the batch that runs now
attention    attention of sequences that lie one behind the other
measure      observes the layers while they stream by
tensors      saves what they see instead
linear, experts    what it observes, and the nodes made of that
"""
