"""Serving a calibrated model: `vllm serve` with what its QUANT_CONFIG needs, after everything was checked.

calibration.py   whether QUANT_CONFIG and the files behind it fit the model, the device and the ranks
modules.py       whether the lists of QUANT_CONFIG, the modules of the model and the nodes in the files go together
arguments.py     what follows `--`
command.py       the command and its environment
offline.py       the same for Python: `open_llm`
"""
