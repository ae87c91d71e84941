"""QUANT_CONFIG: the JSON file that tells INC what to measure or quantize.

methods      the published scale methods
method_form  `scale_method` as a dict
rules        what INC refuses, and what it changes without a word
model        the attributes and what follows from them
check        from a JSON value, or a file, to a config or to findings
presets      the configs of a family
templates    the files of `quantization_config/`
"""
