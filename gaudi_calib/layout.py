"""Every path of a run.

    OUT/<model>/                                       last path component of -m, lower-cased
      maxabs_measure_<device>.json                     config of the MEASURE phase
      maxabs_quant_<device>.json                       config of the QUANTIZE phase (QUANT_CONFIG)
      channel_ranges.safetensors                       torch engine: per-channel ranges at TP 1
      convergence.json                                 torch engine: which samples raised them
      <device>/
        inc_output_hooks_maxabs_<rank>_<world>.json|.npz            ranges
        inc_output_hooks_maxabs_<rank>_<world>_mod_list.json        patched modules
        inc_output_hooks_maxabs_<METHOD>_<rank>_<world>.json|.npz   scales
        calibration_manifest.json
        tensors/                                                    with INC's observer `save`, in place of ranges
        logs/

Grammar of a rank file: <dump>_hooks_<observer>[_<METHOD>][_<rank>_<world>][_mod_list].<json|npz>.
Names are parsed, never searched for as substrings: `_0_1` is inside `_0_16`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.errors import UsageError
from gaudi_calib.files import expand_path

DUMP_NAME = "inc_output"
MANIFEST_NAME = "calibration_manifest.json"
CHANNEL_RANGES_NAME = "channel_ranges.safetensors"
CONVERGENCE_NAME = "convergence.json"
TENSORS_NAME = "tensors"

_RANK_FILE = re.compile(
    r"(?P<dump>.+)_hooks_(?P<observer>maxabs_per_channel|maxabs|shape|save)"
    r"(?:_(?P<method>[A-Z][A-Z0-9]*(?:_[A-Z][A-Z0-9]*)*))?"
    r"(?:_(?P<rank>\d+)_(?P<world>\d+))?"
    r"(?P<mod_list>_mod_list)?"
    r"\.(?P<extension>json|npz)"
)


@dataclass(frozen=True)
class RankFile:
    """The parts of a rank file's name.

    Attributes:
        dump: last component of `dump_stats_path`.
        observer: INC's observer, `maxabs`.
        method: scale method in upper case, or None for ranges.
        rank, world: or None where INC ran without torch.distributed.
        is_mod_list: the list of patched modules.
        extension: `json` or `npz`.
    """

    dump: str = DUMP_NAME
    observer: str = "maxabs"
    method: str | None = None
    rank: int | None = None
    world: int | None = None
    is_mod_list: bool = False
    extension: str = "json"

    @property
    def is_ranges(self) -> bool:
        """Whether it holds ranges of a rank, in the form INC quantizes from."""
        return self.method is None and not self.is_mod_list and self.observer == "maxabs"

    @property
    def position(self) -> tuple[int, int]:
        """Rank and world; a file without them (INC without torch.distributed) is rank 0 of 1."""
        return self.rank or 0, self.world or 1

    @property
    def name(self) -> str:
        """The file name.

        >>> RankFile(method="MAXABS_HW", rank=0, world=16).name
        'inc_output_hooks_maxabs_MAXABS_HW_0_16.json'
        """
        method = f"_{self.method}" if self.method else ""
        suffix = "" if self.rank is None else f"_{self.rank}_{self.world}"
        mod_list = "_mod_list" if self.is_mod_list else ""
        return f"{self.dump}_hooks_{self.observer}{method}{suffix}{mod_list}.{self.extension}"


def parse_rank_file(name: str) -> RankFile | None:
    """Return the parts of a rank file's `name`, or None where it is not one.

    >>> parse_rank_file("inc_output_hooks_maxabs_MAXABS_HW_3_16.npz").method
    'MAXABS_HW'
    >>> parse_rank_file("notes.json") is None
    True
    >>> parse_rank_file("inc_output_hooks_maxabs_4_4.json") is None  # there is no fifth rank of four
    True
    """
    match = _RANK_FILE.fullmatch(name)
    if match is None or (match["rank"] is not None and int(match["rank"]) >= int(match["world"])):
        return None
    return RankFile(
        dump=match["dump"],
        observer=match["observer"],
        method=match["method"],
        rank=None if match["rank"] is None else int(match["rank"]),
        world=None if match["world"] is None else int(match["world"]),
        is_mod_list=match["mod_list"] is not None,
        extension=match["extension"],
    )


def list_rank_files(directory: Path) -> dict[Path, RankFile]:
    """Return the rank files of `directory` in the order of their names; nothing where it does not exist."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return {path: file for path in paths if (file := parse_rank_file(path.name))}


@dataclass(frozen=True)
class DeviceLayout:
    """Paths of the files that a run has for one device.

    Attributes:
        directory: of the rank files, `OUT/<model>/<device>`.
        device: name of the device.
    """

    directory: Path
    device: str

    @property
    def root(self) -> Path:
        """The run directory."""
        return self.directory.parent

    @property
    def measure_config(self) -> Path:
        return self.root / f"maxabs_measure_{self.device}.json"

    @property
    def quant_config(self) -> Path:
        return self.root / f"maxabs_quant_{self.device}.json"

    @property
    def manifest(self) -> Path:
        return self.directory / MANIFEST_NAME

    @property
    def dump_stats_path(self) -> Path:
        return self.directory / DUMP_NAME

    @property
    def tensors(self) -> Path:
        """Where INC's observer `save` leaves tensors."""
        return self.directory / TENSORS_NAME

    def log(self, phase: str) -> Path:
        """Where a phase of an engine logs."""
        return self.directory / "logs" / f"{phase}.log"


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run.

    Attributes:
        out: the directory given with -o.
        model: the model's directory or hub name, as given with -m.
        name: of the run directory, None to call it as the model.
    """

    out: Path
    model: str
    name: str | None = None

    @property
    def root(self) -> Path:
        """`OUT/<name>`; without a name the last path component of the model, lower-cased.

        `.` and `..` count as the directory they mean.

        Raises:
            UsageError: there is no such component.
        """
        if self.name:
            return self.out / self.name
        given = expand_path(self.model)
        name = given.name if given.name not in ("", "..") else given.resolve().name
        if not (self.model and name):
            raise UsageError(
                f"a run cannot be called after the model {self.model!r}",
                why="its files go to OUT/<last part of the path>, and there is none",
                fix="give it a name (--name), or give the directory that holds config.json",
            )
        return self.out / name.lower()

    @property
    def channel_ranges(self) -> Path:
        return self.root / CHANNEL_RANGES_NAME

    @property
    def convergence(self) -> Path:
        return self.root / CONVERGENCE_NAME

    def device(self, name: str) -> DeviceLayout:
        """Paths of the files for one device."""
        return DeviceLayout(self.root / name, name)
