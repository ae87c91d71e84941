"""Which rank files a directory holds, as far as their names tell."""

from functools import cached_property
from pathlib import Path

from gaudi_calib.errors import FileError
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.layout import RankFile, list_rank_files


class RankDirectory:
    """The rank files of a directory.

    Attributes:
        path: the directory; it need not exist.
        dump: first part of the names that count, or None for all.
    """

    def __init__(self, path: Path, *, dump: str | None = None):
        self.path, self.dump = path, dump

    @cached_property
    def files(self) -> dict[Path, RankFile]:
        """The rank files, in the order of their names."""
        found = list_rank_files(self.path)
        return {path: file for path, file in found.items() if self.dump in (None, file.dump)}

    @property
    def dumps(self) -> list[str]:
        """First parts of the names of the ranges: more than one where the directory holds several measurements."""
        return sorted({file.dump for file in self.files.values() if file.is_ranges})

    @cached_property
    def worlds(self) -> dict[int, dict[int, Path]]:
        """The ranges by world and rank: the path of the `.json`, which need not be there where the `.npz` is.

        Raises:
            FileError: the directory is missing, or two files are ranges of the same rank.
        """
        if not self.path.is_dir():
            raise FileError(
                "no such directory", where=self.path, fix="give the <device> directory of a run, e.g. OUT/<model>/g3"
            )
        worlds: dict[int, dict[int, Path]] = {}
        for path, file in self.files.items():
            if not file.is_ranges:
                continue
            (rank, world), text = file.position, path.with_suffix(".json")
            other = worlds.setdefault(world, {}).setdefault(rank, text)
            if other != text:
                raise FileError(
                    f"two files are ranges of rank {rank} of {world}: {other.name} and {text.name}",
                    where=self.path,
                    why="they are of different measurements",
                    fix=f"say which measurement is meant: {self._list_choices(self.dumps)}"
                    if len(self.dumps) > 1
                    else "move one of the measurements to a directory of its own",
                )
        return {world: dict(sorted(ranks.items())) for world, ranks in sorted(worlds.items())}

    @property
    def whole_worlds(self) -> list[int]:
        """The worlds of which every rank has ranges, in the form people read or in the one INC does."""
        found = {file.position for file in self.files.values() if file.is_ranges}
        worlds = sorted({world for _, world in found})
        return [world for world in worlds if all((rank, world) in found for rank in range(world))]

    def require_worlds(self) -> dict[int, dict[int, Path]]:
        """Return `worlds`, of which there is at least one.

        Raises:
            FileError: there are no ranges; see also `worlds`.
        """
        if self.worlds:
            return self.worlds
        others = sorted({file.dump for file in list_rank_files(self.path).values() if file.is_ranges})
        inside = [str(self.path / name) for name in DEVICES if list_rank_files(self.path / name)]
        fix = "give the directory that holds such files: <device> of a run, e.g. OUT/<model>/g3"
        if self.dump and others:
            fix = f"give {self._list_choices(others)}"
        elif inside:
            fix = f"give {' or '.join(inside)}"
        raise FileError(
            "no ranges in the directory",
            where=self.path,
            why=f"no file in it is called like {self.name_file(0, 1, extension='json').name}",
            fix=fix,
        )

    def list_methods(self, world: int) -> list[str]:
        """Return the methods, in upper case, that there are scale files of `world` for."""
        return sorted({file.method for file in self.files.values() if file.method and file.position[1] == world})

    def list_scales(self, world: int, method: str) -> list[Path]:
        """Return the scale files of one method and of `world`."""
        return [path for path, file in self.files.items() if (file.method, file.position[1]) == (method, world)]

    def find_scales(self, world: int, method: str) -> dict[int, Path]:
        """Return the scales of `world` by rank: the path of the `.json`, which need not be there; see `worlds`."""
        found = {self.files[path].position[0]: path.with_suffix(".json") for path in self.list_scales(world, method)}
        return dict(sorted(found.items()))

    def name_file(self, rank: int, world: int, *, method: str | None = None, extension: str = "npz") -> Path:
        """Return where the file of one rank is, or would be: ranges, or scales of `method`."""
        alike = (file.dump for file in self.files.values() if file.position[1] == world)
        dump = self.dump or next(alike, None) or next((file.dump for file in self.files.values()), RankFile().dump)
        return self.path / RankFile(dump, method=method, rank=rank, world=world, extension=extension).name

    def list_missing(self, world: int, *, method: str | None = None) -> list[Path]:
        """Return the npz files that INC would miss on the ranks of `world`."""
        wanted = [self.name_file(rank, world, method=method) for rank in range(world)]
        return [path for path in wanted if path not in self.files]

    @staticmethod
    def _list_choices(dumps: list[str]) -> str:
        return " or ".join(f"--dump {dump}" for dump in dumps)
