"""Time and memory of `unify` and `expand` against the same rule in nested lists (nested_lists.py).

    python benchmarks/topology.py [--rounds 5]

Makes, in a temporary directory, ranges and MAXABS_HW scales as a run of vllm-gaudi leaves them:
the size of DeepSeek-R1 (61 layers, 58 of them with 256 experts, EP 8) and of Llama 405B (126
layers, TP 8); bfloat16 values, a few idle experts. Contenders take turns, each in a process of
its own with everything it needs to start; the best of the rounds counts. `unify` does more than
the baseline: it computes scales anew, reads every npz too, and flushes its files to the disk.
The baseline's expand writes no scales (ours does unless told not to), and like the reference's
leaves every expert-parallel rank the weights of all experts.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import RankSet
from gaudi_calib.ranges.table import Inventory, RangeShape, RangeTable
from gaudi_calib.rankfiles.npz import pack_value
from gaudi_calib.rankfiles.store import write_rank_set
from gaudi_calib.scales.compute import compute_scales

BASELINE = Path(__file__).with_name("nested_lists.py")
WORLD = 8
IDLE_SHARE = 0.002
LINEAR, ROW, MATMUL, B2B = (
    RangeShape((1,), None, 1),
    RangeShape((1,), (1, 1), 1),
    RangeShape((1, 1)),
    RangeShape((1, 1), (1,)),
)
CACHE, SDPA = RangeShape((1,)), RangeShape((1, 1, 1), (1, 1))
Nodes = dict[str, RangeShape]


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        name: what is done.
        baseline, ours: words after the program.
        target: how many times faster than the baseline the project promises to be, or None.
    """

    name: str
    baseline: tuple[object, ...]
    ours: tuple[object, ...]
    target: float | None


@dataclass(frozen=True)
class Cost:
    """Seconds and MiB (largest resident set of the process tree) of one run."""

    seconds: float
    peak_mb: float


def list_latent_nodes(experts: int, layers: int = 61, dense: int = 3) -> Nodes:
    """Nodes of a rank of a model with latent attention and `experts` local experts."""
    nodes: Nodes = {}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn.mla_attn.", f"model.layers.{layer}.mlp."
        impl = attention + "mla_attn.impl."
        nodes |= {attention + "q_b_proj": LINEAR, attention + "o_proj": ROW, impl + "kv_b_proj": LINEAR}
        nodes |= {impl + "matmul_qk": MATMUL, impl + "matmul_av": MATMUL}
        nodes |= {impl + "batch2block_matmul": B2B, impl + "block2batch_matmul": B2B, impl + "latent_cache_k": CACHE}
        nodes[impl + "fused_scaled_dot_product_attention"] = SDPA
        if layer < dense:
            nodes |= {mlp + "gate_up_proj": LINEAR, mlp + "down_proj": ROW}
            continue
        op = mlp + "experts.routed_experts.moe_op"
        nodes |= {mlp + "shared_experts.gate_up_proj": LINEAR, mlp + "shared_experts.down_proj": ROW}
        nodes[op] = RangeShape((1,), (1,) * (1 + experts))
        nodes |= {f"{op}.{kind}.{i}": LINEAR for kind in ("w13_list", "w2_list") for i in range(experts)}
    return nodes


def list_dense_nodes(layers: int = 126) -> Nodes:
    """Nodes of a rank of a dense model."""
    nodes: Nodes = {}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        impl = attention + "attn.impl."
        nodes |= {attention + "qkv_proj": LINEAR, attention + "o_proj": ROW}
        nodes |= {impl + "matmul_qk": MATMUL, impl + "matmul_av": MATMUL}
        nodes |= {impl + "batch2block_matmul": B2B, impl + "block2batch_matmul": B2B}
        nodes |= {impl + "k_cache": CACHE, impl + "v_cache": CACHE, impl + "fused_scaled_dot_product_attention": SDPA}
        nodes |= {mlp + "gate_up_proj": LINEAR, mlp + "down_proj": ROW}
    return nodes | {"lm_head": LINEAR}


def write_set(directory: Path, nodes: Nodes, world: int) -> None:
    """Write ranges and scales of all ranks; the npz as INC writes it."""
    inventory = Inventory(tuple(nodes), tuple(nodes.values()))
    for rank in range(world):
        random = np.random.default_rng(rank)
        numbers = round_to_bf16(random.lognormal(0, 1, inventory.size))
        for name, shape, start in zip(inventory.names, inventory.shapes, inventory.starts.tolist(), strict=True):
            if "_list." in name:
                numbers[start] = 0
            elif name.endswith("moe_op"):
                maxima = numbers[start + 2 : start + shape.size]
                maxima[random.random(maxima.size) < IDLE_SHARE] = 0
        ranges = RankSet(rank, world, RangeTable(inventory, numbers), inventory.names, 256)
        scales = compute_scales(ranges, "maxabs_hw", GAUDI2, weights=lambda _: None)
        paths = write_rank_set(directory, ranges) + write_rank_set(directory, scales, method="MAXABS_HW")
        for path in paths:
            if path.suffix == ".npz":  # the frames that np.savez cuts, which our own writer does not
                path.write_bytes(pack_value(np.load(path, allow_pickle=True)["arr_0"].item()))


def run(words: Sequence[object], out: Path) -> Cost:
    """Run a program in a process of its own."""
    cache = {"PYTHONPYCACHEPREFIX": str(out.parent / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words), "-o", str(out)], stdout=subprocess.DEVNULL, env=os.environ | cache
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, words))}")
    return Cost(seconds, usage.ru_maxrss / 1024)


def write_sets(root: Path) -> None:
    """Write all sets."""
    write_set(root / "latent" / "g2", list_latent_nodes(256 // WORLD), WORLD)
    write_set(root / "whole" / "g2", list_latent_nodes(256), 1)
    write_set(root / "dense" / "g2", list_dense_nodes(), WORLD)


def list_races(root: Path) -> list[Race]:
    """Return what is compared on the sets in `root`."""

    def race(name: str, command: str, size: int, source: str, target: float | None, flags: str = "") -> Race:
        words = (command, "-m", root / source / "g2", "-r" if command == "unify" else "-w", size)
        theirs = ("-u",) if "-u" in flags.split() else ()
        return Race(name, (BASELINE, *words, *theirs), ("-m", "gaudi_calib", *words, *flags.split()), target)

    return [
        race("R1 size, unify EP 8 to 1", "unify", 1, "latent", 4, "-u"),
        race("R1 size, expand to EP 16", "expand", 16, "whole", 10, "-u"),
        race("the same, ranges only", "expand", 16, "whole", 10, "-u -s"),
        race("R1 size, expand to TP 16", "expand", 16, "whole", None, "--no-expert-parallel"),
        race("the same, ranges only", "expand", 16, "whole", None, "--no-expert-parallel -s"),
        race("405B, unify TP 8 to 1", "unify", 1, "dense", 1 / 0.6),
    ]


def main() -> None:
    """Print one line per comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        # In a process of its own: the peak memory of a child counts from its parent's.
        maker = multiprocessing.Process(target=write_sets, args=(root,))
        maker.start()
        maker.join()
        print(f"{'':26}{'nested lists':>16}{'gaudi-calib':>18}{'faster':>9}{'promised':>10}")
        for race in list_races(root):
            print(compare(race, rounds, root), flush=True)


def compare(race: Race, rounds: int, root: Path) -> str:
    """Run both contenders in turn and return a line of the table."""
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(run(race.baseline, root / "theirs"))
        ours.append(run(race.ours, root / "ours"))
    best = [min(cost.seconds for cost in costs) for costs in (theirs, ours)]
    peaks = [max(cost.peak_mb for cost in costs) for costs in (theirs, ours)]
    ratio = statistics.median(baseline.seconds / cost.seconds for baseline, cost in zip(theirs, ours, strict=True))
    promise = "-" if race.target is None else f"{race.target:.1f}x"
    cells = "".join(f"{seconds:8.2f} s {peak:4.0f} MB " for seconds, peak in zip(best, peaks, strict=True))
    return f"{race.name:26}{cells}{best[0] / best[1]:7.1f}x {promise:>9}  (median {ratio:.1f}x)"


if __name__ == "__main__":
    main()
