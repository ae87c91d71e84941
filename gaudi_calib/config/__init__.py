"""QUANT_CONFIG: the JSON file that tells INC what to measure or quantize. Each module imports from those above it.

methods      the published scale methods
method_form  `scale_method` as a dict
model        the attributes and what follows from them
rules        what INC refuses, and what it changes without a word
check        from a JSON value to a config or to findings
file         the same from a file, and back
presets      the configs of a family
templates    the files of `quantization_config/`
"""
