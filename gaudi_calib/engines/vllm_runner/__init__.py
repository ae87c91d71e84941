"""Running vLLM: in child processes for the phases of a calibration, and as a server or an `LLM` for serving.

    settings.py   what vLLM must be told to use a QUANT_CONFIG on a platform (engine arguments, environment)
    phases.py     the phases of a calibration, as values
    child.py      one phase, in its own process: the only module here that imports vLLM
    process.py    starts a phase, mirrors its log, ends what it leaves behind
    cluster.py    whether a Ray cluster can hold the ranks

The calling process never imports torch or vLLM: a device that a crashed engine holds is
free again when the child is gone, and each phase reads QUANT_CONFIG afresh.
"""
