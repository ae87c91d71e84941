"""`convergence.json`: which samples raised the ranges of a measurement, one file beside its channel ranges.

    {"format": 1, "measurement": "sha256:...", "samples": 128, "origins": ["chat.jsonl, row 9", ...],
     "nodes": {"lm_head": {"inputs[0]": {"median": 11.5, "moves": [[0, 9.75], [3, 12.0]]}}}}

`measurement` is the hash of the channel ranges it is of, so that it is not taken for that of others.
"""

from pathlib import Path
from typing import Any

from gaudi_calib.errors import FileError
from gaudi_calib.files import read_json, write_json
from gaudi_calib.ranges.convergence import Convergence
from gaudi_calib.ranges.progress import Progress

_FORMAT = 1


def write_convergence(path: Path, convergence: Convergence, measurement: str) -> None:
    """Write `convergence` of the channel ranges that have the hash `measurement`, atomically.

    Raises:
        FileError: the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "measurement": measurement,
        "samples": convergence.samples,
        "origins": list(convergence.origins),
        "nodes": {
            name: {part: {"median": progress.median, "moves": progress.moves} for part, progress in parts.items()}
            for name, parts in convergence.nodes.items()
        },
    }
    write_json(path, content, indent=None)


def read_convergence(path: Path) -> tuple[Convergence, str]:
    """Return what `write_convergence` wrote: the convergence, and which measurement it is of.

    Raises:
        FileError: the file is missing, damaged, or of another version.
    """
    content = read_json(path)
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this release reads {_FORMAT}")
        samples, origins = int(content["samples"]), [str(origin) for origin in content["origins"]]
        if len(origins) not in (0, samples):
            raise ValueError(f"it names {len(origins)} of {samples} samples")
        nodes = {
            str(name): {str(part): _read_progress(told, samples) for part, told in parts.items()}
            for name, parts in content["nodes"].items()
        }
        return Convergence(samples, nodes, origins), str(content["measurement"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(
            f"{path.name} is damaged",
            where=path,
            why=why,
            fix="measure again; or delete it: ranges and scales do not need it",
        ) from error


def _read_progress(told: dict[str, Any], samples: int) -> Progress:
    moves = tuple((int(sample), float(value)) for sample, value in told["moves"])
    before = (-1, -1.0)
    for move in moves:
        if not (before[0] < move[0] < samples and before[1] < move[1] < float("inf")):
            raise ValueError(f"a maximum moves from {before} to {move}")
        before = move
    median = float(told["median"])
    if not moves or not 0 <= median <= before[1]:
        raise ValueError(f"a maximum of {before[1]} has the median {median}")
    return Progress(moves, median)
