"""What can be found in a calibration, by the short name that `check --json` gives it, which stays the same."""

from collections.abc import Iterable

from gaudi_calib.errors import Finding, Findings

# Serving fails, or answers are wrong without a word.
ERRORS = {
    "config-invalid": "INC cannot use the QUANT_CONFIG",
    "place-missing": "there are no ranges where the path, or a dump_stats_path, leads",
    "run-unfinished": "the run never finished, and no earlier result is there",
    "world-missing": "no ranges for the number of ranks asked for",
    "rank-missing": "some ranks have ranges, others have none",
    "npz-missing": "a file has no .npz, which is all that INC reads",
    "file-damaged": "a file cannot be read, or its .json and .npz differ",
    "file-changed": "a file is not the one that the run wrote",
    "nodes-differ": "ranks have different nodes, or experts that cannot be told apart",
    "model-foreign": "another checkpoint was measured",
    "module-uncovered": "a module that INC will quantize has no ranges",
    "range-damaged": "a range that a scale comes from is NaN or infinite",
    "layer-dead": "no expert of a layer saw a token",
    "scales-missing": "ranks have ranges and no scales of the method that serves",
    "scales-foreign": "scales of nodes that have no ranges",
    "scales-stale": "scales were made from other ranges or settings",
    "scales-zero": "scales of 0 or infinity: dividing by them gives inf or NaN",
    "scales-differ": "scales do not follow from the ranges, and nothing known explains them",
}
# Accuracy, or a check, is lost.
WARNINGS = {
    "config": "INC or vllm-gaudi changes or ignores what a config says",
    "pattern-idle": "a pattern of the config matches no module",
    "place-moved": "a config names another place than the one where its run is",
    "run-repeated": "a later run failed; the files are those of the last good one",
    "device-unknown": "nothing tells which device will serve",
    "module-silent": "INC patched a module that never ran",
    "module-unmeasured": "a module of the model has no ranges in files of unknown origin",
    "model-unread": "the model cannot be looked at",
    "range-zero": "ranges of 0",
    "range-beyond": "ranges that no scale of the device brings into the FP8 range",
    "expert-idle": "experts that saw no token",
    "expert-cold": "experts that saw few tokens",
    "data-little": "few prompts or tokens",
    "data-unsettled": "scales still grew when the data ended",
    "sample-outlier": "a few samples set ranges alone",
    "attention-fails": "the model is known to fail with its KV cache in FP8",
    "kv-cache": "the attention matmuls and the caches they read have different ranges",
    "rank-outlier": "the ranges of a rank are unlike those of the others",
    "layer-outlier": "the ranges of a layer are unlike those of the others",
    "scales-otherwise": "scales follow from the ranges by another method, device or arithmetic",
}


def sort_findings(found: Iterable[Finding]) -> Findings:
    """Return findings as errors and warnings, each once, in the order they were found."""
    unique = list(dict.fromkeys(found))
    return Findings(
        tuple(finding for finding in unique if finding.kind in ERRORS),
        tuple(finding for finding in unique if finding.kind in WARNINGS),
    )
