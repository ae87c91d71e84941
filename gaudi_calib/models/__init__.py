"""What a model is, from names and config.json alone: no weight is read.

families     one row of facts per model family; no file but this and `field` has a model's name
field        what engineers in the field set per model
modules      the words these facts are written in
source       what `-m` means, and what its config.json says
headers      what lies in a safetensors file, from its header
fingerprint  telling one checkpoint from another
"""
