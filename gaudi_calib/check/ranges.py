"""Ranges that make bad scales, and measurements with too little data."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from gaudi_calib.advice import advise_mending
from gaudi_calib.check.subject import Subject, iterate_ranks
from gaudi_calib.config.methods import DEFAULT_METHOD, MethodTable, get_scale_method
from gaudi_calib.errors import CalibrationError, Finding, TopologyError, count, name_first
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.ranges.coverage import list_cold, suggest_data
from gaudi_calib.ranges.derive import select_nodes
from gaudi_calib.ranges.experts import detect_expert_parallel, find_expert_layers, list_idle_experts
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.sources import find_damaged
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges
from gaudi_calib.runs.convergence import find_unsettled_dir
from gaudi_calib.scales.limits import find_limits

# Fewer leave experts cold and maxima far from what serving meets.
_FEW_PROMPTS, _FEW_TOKENS = 32, 2048


def find_not_finite(subject: Subject) -> Iterator[Finding]:
    """Yield the ranges that scales come from and that are NaN or infinite."""
    found = [
        f"{name} {part} is {value} on rank {rank.rank} of {rank.world}"
        for rank, table in iterate_ranks(subject)
        for name, part, value in find_damaged(table)
    ]
    if found:
        yield Finding(
            name_first(found),
            f"ranges that are NaN or infinite: {len(found)}",
            "a sample overflowed; the scale of such a range is no number",
            "find the sample (measure with -b 1) and measure again",
            "range-damaged",
        )


def find_extremes(subject: Subject) -> Iterator[Finding]:
    """Yield the ranges of 0, and those that no scale brings into the FP8 range; see `find_limits`."""
    device, config = subject.scales_device, subject.config
    if device is None:
        return
    ranks = [rank for rank, _ in iterate_ranks(subject)]
    if config is not None and config.mode == "QUANTIZE":
        yield from find_limits([select_nodes(rank, config) for rank in ranks], config.method_table, device)
        return
    for finding in find_limits(ranks, MethodTable(get_scale_method(DEFAULT_METHOD)), device):
        yield replace(finding, why=f"with {DEFAULT_METHOD}, where no config says otherwise: {finding.why}")


def find_idle_experts(subject: Subject) -> Iterator[Finding]:
    """Yield the experts, and the layers of them, that saw no token."""
    for world, ranks in subject.ranges.items():
        idle: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for table in _list_distinct(subject, world):
            with suppress(TopologyError):  # told of elsewhere
                total.update({layer.op: layer.size for layer in find_expert_layers(table.inventory)})
                idle.update(op for op, _ in list_idle_experts(table))
        if not idle:
            continue
        yield Finding(
            name_first(f"{lost} of {total[op]} in {op}" for op, lost in idle.most_common()),
            f"experts that saw no token: {idle.total()} of {total.total()} on {count(world, 'rank')}",
            "their ranges are 0: with a hardware-aligned method they add next to nothing when the router sends a token "
            "to one, with any other their scale of 0 makes it inf or NaN",
            "measure with more data, and of more kinds",
            "expert-idle",
        )
        dead = [op for op, lost in idle.items() if lost == total[op] and len(ranks) == world]
        if dead:
            yield Finding(
                name_first(dead),
                f"layers whose experts are all at 0: {len(dead)} of {len(total)}",
                f"no token reached them on {count(world, 'rank')} when measured: serving loses what they compute",
                "measure again, with the router of the model in place; or add the layers to the blocklist",
                "layer-dead",
            )


def _list_distinct(subject: Subject, world: int) -> list[RangeTable]:
    """Return the ranges of the ranks that hold different experts: of the first, where all hold a slice of each."""
    tables = [tabulate_ranges(rank.nodes) for rank in subject.ranges[world]]
    made = subject.place.manifest
    shared = made.shares_experts(world) if made else None
    if shared is None and all(table.inventory.equals(tables[0].inventory) for table in tables[1:]):
        with suppress(TopologyError):
            shared = detect_expert_parallel(tables, find_expert_layers(tables[0].inventory)) if tables else None
    return tables[:1] if shared is False else tables


def find_cache_gaps(subject: Subject) -> Iterator[Finding]:
    """Yield the attention matmuls whose ranges are not those of the caches they read."""
    changed: dict[str, None] = {}
    for rank, table in iterate_ranks(subject):
        after = tabulate_ranges(apply_kv_cache(rank).nodes)
        differs = ~((after.numbers == table.numbers) | (np.isnan(after.numbers) & np.isnan(table.numbers)))
        changed |= dict.fromkeys(table.describe_number(place)[0] for place in np.flatnonzero(differs).tolist())
    if changed:
        yield Finding(
            name_first(changed),
            f"attention matmuls that do not have the ranges of the caches they read: {len(changed)}",
            "different scales cost a re-quantization between cache and matmul at every step",
            f"run: {advise_mending(subject.place.path, subject.device)}",
            "kv-cache",
        )


def find_little_data(subject: Subject) -> Iterator[Finding]:
    """Yield what the manifest says about too few prompts, tokens, and tokens per expert."""
    made = subject.place.manifest
    if made is None:
        return
    where, data, coverage = str(subject.place.path / MANIFEST_NAME), made.dataset, made.expert_coverage
    counts = {} if data is None else {"prompts": data.prompts, "tokens": data.tokens}
    few = {"prompts": _FEW_PROMPTS, "tokens": _FEW_TOKENS}
    short = [f"{used} {name}" for name, used in counts.items() if used is not None and used < few[name]]
    if short:
        yield Finding(
            where,
            f"it was measured with {' and '.join(short)}",
            f"fewer than {_FEW_PROMPTS} prompts or {_FEW_TOKENS} tokens miss the outliers that serving meets: "
            "what is beyond a range is clipped",
            "measure with more, like those that will be served (-d, -l)",
            "data-little",
        )
    cold = {} if coverage is None else {
        op: left for op, experts in coverage.cold.items()
        if (left := [expert for expert in experts if expert not in coverage.filled.get(op, {})])
    }  # fmt: skip
    if coverage is not None and cold:
        yield Finding(
            where,
            f"experts that saw fewer than {coverage.min_tokens} tokens: {sum(map(len, cold.values()))}",
            list_cold(coverage.model_copy(update={"cold": cold})),
            suggest_data(coverage, (data.tokens if data else None) or 0),
            "expert-cold",
        )


def find_unsettled(subject: Subject) -> Iterator[Finding]:
    """Yield what the record of the measurement says about ranges that the data has not settled."""
    if subject.config is None:
        return
    try:
        yield from find_unsettled_dir(subject.place)
    except CalibrationError as error:
        yield Finding.of(error, "file-damaged")
