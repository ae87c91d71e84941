"""Converting an FP8 checkpoint for Gaudi 2: FP8 weights halved, their scales doubled, all else as it was.

The result has the source's layout to the byte: headers (names, types, shapes, metadata such
as `format`) are unchanged. The arithmetic is in halving.py, the files are in writer.py.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.dequantize import SCALE_TYPES, find_input, read_scale
from gaudi_calib.checkpoints.halving import (
    LARGEST_OF_GAUDI2,
    count_codes,
    count_nan,
    count_rounded,
    double_scale,
    find_largest,
    halve,
    is_half,
)
from gaudi_calib.checkpoints.writer import ConversionPlan, describe_plan, plan_conversion, read_chunks, split_bytes
from gaudi_calib.errors import FileError, ModelError
from gaudi_calib.files import expand_path, read_json
from gaudi_calib.models.headers import Header, Span, read_header
from gaudi_calib.models.source import GAUDI2_RECORD, HALVED_ENV, list_quantizations

_FP8 = ("F8_E4M3", "F8_E5M2")
# vllm-gaudi reads this key of compressed-tensors configs: values that fit Gaudi 2 are not halved again while loading.
_FLAVOR_KEY, _FLAVOR = "fp8_dtype_flavor", "float8_e4m3fnuz"
# What is counted: tensors halved, tensors doubled, FP8 values halved, those of them that lost their last bit.
_COUNTS = ("weights", "scales", "values", "rounded")


@dataclass(frozen=True)
class Gaudi2Converter:
    """The `Converter` for Gaudi 2.

    Attributes:
        checkpoint: what is converted.
        halved: names of the FP8 weights.
        doubled: names of their scales, and of the static scales of what they multiply and of caches.
    """

    record_name: ClassVar[str] = GAUDI2_RECORD
    checkpoint: Checkpoint
    halved: frozenset[str]
    doubled: frozenset[str]

    @property
    def is_flavored(self) -> bool:
        """Whether config.json gets the mark by which vllm-gaudi knows that the values fit Gaudi 2."""
        return self.checkpoint.source.is_flavored

    def plan_header(self, header: Header) -> Header:
        return header

    def convert(self, source: Path, span: Span, counts: Counter[str]) -> Iterator[bytes | bytearray]:
        if span.name in self.halved:
            return _halve_span(source, span, counts)
        if span.name in self.doubled:
            counts["scales"] += 1
            return iter([_double_span(source, span)])
        return read_chunks(source, span)

    def is_converted(self, name: str, old: torch.Tensor | None, new: torch.Tensor) -> bool:
        assert old is not None, name
        if name in self.doubled:
            return torch.equal(read_scale(new).to(torch.float64), 2 * read_scale(old).to(torch.float64))
        compare = is_half if name in self.halved else torch.equal
        return all(compare(before, after) for before, after in zip(split_bytes(old), split_bytes(new)))

    def change_file(self, path: Path) -> Any | None:
        if not self.is_flavored or path != Path("config.json"):
            return None
        config = read_json(self.checkpoint.directory / path)
        for quantization in list_quantizations(config):
            quantization[_FLAVOR_KEY] = _FLAVOR
        return config


def plan_gaudi2(source: Path, out: Path) -> ConversionPlan[Gaudi2Converter]:
    """Decide what happens to every tensor and file of `source`; nothing is written.

    FP8 weights that have a scale are halved. Their scales are doubled, and so are static
    scales of the activations they multiply and of KV caches, which were made for +-448 too.

    Raises:
        ModelError: no FP8 weights, weights that fit already, or a checkpoint that cannot be read.
        UsageError: `out` is `source` or inside it.
        FileError: `out` holds something else, or the disk is too small.
    """
    checkpoint = Checkpoint(expand_path(source))
    plan = plan_conversion(checkpoint, out, _make_converter(checkpoint))
    if not any(_is_too_large(plan, shard) for shard in plan.shards):
        raise ModelError(
            "the checkpoint fits Gaudi 2 already, there is nothing to convert",
            where=plan.source,
            why=f"no FP8 weight is above {LARGEST_OF_GAUDI2:g}",
            fix="serve it as it is, with VLLM_SCALE_ADJUSTMENT=0 in the environment",
        )
    return plan


def _make_converter(checkpoint: Checkpoint) -> Gaudi2Converter:
    _ = checkpoint.shapes  # refuses what cannot be read
    weights = checkpoint.weights.values()
    scale_of = {weight.values: weight.scale for weight in weights if weight.scale and not weight.packed}
    halved, doubled = set(scale_of), set(scale_of.values())
    fp8 = [name for name, (dtype, _) in checkpoint.stored.items() if dtype in _FP8]
    left = [name for name in fp8 if name not in halved | doubled]
    if left:
        raise ModelError(
            f"{left[0]!r} is FP8 and no part of the checkpoint",
            where=checkpoint.directory,
            why="a weight file holds it and the index does not list it; loaders read it all the same",
            fix="get the checkpoint again from its source",
        )
    if not halved:
        raise ModelError(
            "the checkpoint has no FP8 weights, there is nothing to convert",
            where=checkpoint.directory,
            why=f"its weights are {', '.join(sorted({checkpoint.stored[name][0] for name in checkpoint.tensors}))}",
            fix="calibrate it as it is; only FP8 (E4M3) weights are too large for Gaudi 2",
        )
    for name in checkpoint.stored:
        owner = find_input(name)
        if owner == "" or (owner is not None and (owner in halved or f"{owner}.weight" in halved)):
            doubled.add(name)
    return Gaudi2Converter(checkpoint, frozenset(halved), frozenset(doubled))


def _is_too_large(plan: ConversionPlan[Gaudi2Converter], shard: str) -> bool:
    """Whether any FP8 weight of a file is too large for Gaudi 2; the first value that is ends the search."""
    return any(
        find_largest(count_codes(chunk)) > LARGEST_OF_GAUDI2
        for span in plan.shards[shard].spans
        if span.name in plan.converter.halved
        for chunk in read_chunks(plan.source / shard, span)
    )


def _halve_span(source: Path, span: Span, counts: Counter[str]) -> Iterator[bytearray]:
    codes = torch.zeros(256, dtype=torch.int64)
    for chunk in read_chunks(source, span):
        codes += count_codes(chunk)
        yield halve(chunk)
    if count_nan(codes):
        raise ModelError(
            f"{count_nan(codes)} values of {span.name!r} are NaN",
            where=source,
            why="a weight is a number",
            fix="get the checkpoint again from its source",
        )
    counts.update(weights=1, values=span.stop - span.start, rounded=count_rounded(codes))


def _double_span(source: Path, span: Span) -> bytes:
    with safe_open(source, framework="pt") as file:
        doubled = double_scale(file.get_tensor(span.name)) if span.dtype in SCALE_TYPES else None
    if doubled is None:
        raise ModelError(
            f"the scale {span.name!r} cannot be doubled",
            where=source,
            why=f"twice its largest value is no {span.dtype}",
            fix="get the checkpoint again from its source, or convert the unquantized one to FP8 for Gaudi 2",
        )
    return doubled.reshape(-1).view(torch.uint8).numpy().tobytes()


def _find_unconverted(plan: ConversionPlan[Gaudi2Converter]) -> list[Path]:
    """Return the safetensors files that are no part of the checkpoint, travel as they are and hold FP8."""
    found = []
    for path in plan.copies:
        if path.suffix == ".safetensors":
            with contextlib.suppress(FileError):
                if any(span.dtype in _FP8 for span in read_header(plan.source / path).spans):
                    found.append(path)
    return found


def describe_conversion(plan: ConversionPlan[Gaudi2Converter], *, is_full: bool) -> str:
    """Return the plan as lines for people.

    Args:
        is_full: also every file with its size.
    """
    halved, doubled = len(plan.converter.halved), len(plan.converter.doubled)
    copied = len(plan.converter.checkpoint.stored) - halved - doubled
    tensors = f"{halved} FP8 weights halved, {doubled} scales doubled, {copied} tensors as they are"
    others = f"copied; config.json gets {_FLAVOR_KEY}" if plan.converter.is_flavored else "copied"
    left = [f"  not converted, though FP8: {path}, which the index does not list" for path in _find_unconverted(plan)]
    return "\n".join([describe_plan(plan, tensors=tensors, others=others, is_full=is_full), *left])


def describe_result(plan: ConversionPlan[Gaudi2Converter], counts: Counter[str]) -> str:
    """Return what was done, from the counts of `run_conversion`, and how to serve it, as lines for people."""
    weights, scales, values, rounded = (counts[name] for name in _COUNTS)
    lines = [
        f"{weights} weights halved, {scales} scales doubled; {rounded} of {values} values "
        f"({rounded / (values or 1):.2%}) lost their last bit (2^-9 before the scale), the others are exact",
        f"{plan.out}",
    ]
    if not plan.converter.is_flavored:
        lines.append("Serve it with VLLM_SCALE_ADJUSTMENT=0, or vllm-gaudi halves the weights again while loading.")
    return "\n".join(lines)


def dump_result(plan: ConversionPlan[Gaudi2Converter], counts: Counter[str]) -> str:
    """Return the same as JSON."""
    env = {} if plan.converter.is_flavored else HALVED_ENV
    return json.dumps({"model": str(plan.out), "env": env, **{name: counts[name] for name in _COUNTS}}, indent=2)
