"""Serving a calibrated model: `vllm serve` with what its QUANT_CONFIG needs, after everything was checked.

calibration.py   whether QUANT_CONFIG and the files behind it fit the model, the device and the ranks
advice.py        the commands that mend what is wrong
arguments.py     what follows `--`
command.py       the command and its environment
offline.py       the same for Python: `open_llm`
"""
