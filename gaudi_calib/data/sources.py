"""Where rows come from: a file, a directory, the Hugging Face hub, or the shipped set.

    builtin                               the prompt set shipped with the package
    NAME.pkl .json .jsonl .parquet .csv   a table; also compressed: .gz .xz .bz2 after it
    NAME.txt                              one prompt per line, blank lines skipped
    DIRECTORY                             `save_to_disk` of datasets, or data files of one
                                          suffix (those of the train split, where named so)
    NAME, ORG/NAME or ORG/NAME:CONFIG     a hub dataset (split `train`, else the only one)

Paths are relative to the caller's directory. A .pkl opens through `pickles.read_pickle`.
"""

import bz2
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, Any

from gaudi_calib.data.bad_rows import BadRows, RowError
from gaudi_calib.data.pickles import read_pickle
from gaudi_calib.data.rows import COLUMNS, Record, Row, make_rows
from gaudi_calib.errors import DataError
from gaudi_calib.files import expand_path, parse_json, unpack

BUILTIN = "builtin"
Records = list[Record | RowError]

_DECOMPRESSORS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
_NOT_DATA = {"readme.txt", "dataset_infos.json"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def read_rows(dataset: str, *, columns: Mapping[str, str] | None = None, bad_rows: BadRows | None = None) -> list[Row]:
    """Return the rows of a dataset, in its order.

    Args:
        dataset: a path, a hub name, or `builtin`; see the module.
        columns: our column name -> the field that holds it; see `rows`.
        bad_rows: takes the rows that are left out; without it there may be none.

    Raises:
        DataError: it does not exist, cannot be read, is empty or has no usable column.
        RowError: too many rows cannot be used; says which row or line.
        FileError: a pickle that asks for more than tables, or a compressed file that unpacks to far more than its size.
        UsageError: `columns` names an unknown column.
    """
    columns = columns or {}
    path = expand_path(dataset)
    if dataset == BUILTIN:
        with resources.as_file(resources.files(__package__) / "builtin.jsonl") as builtin:
            records = _read_file(builtin, BUILTIN)
    elif path.is_dir():
        records = _read_directory(path, columns)
    elif path.exists():
        records = _read_file(path, dataset)
    else:
        records = _read_hub(dataset, columns)
    return make_rows(records, source=dataset, columns=columns, bad_rows=bad_rows or BadRows())


def locate_dataset(name: str) -> str:
    """Return the name that a dataset has whatever the caller's directory: absolute where it is a path."""
    path = expand_path(name)
    return str(path.absolute()) if name != BUILTIN and path.exists() else name


def _read_file(path: Path, source: str) -> Records:
    compression = path.suffix.lower() if path.suffix.lower() in _DECOMPRESSORS else ""
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"unknown dataset suffix {''.join(path.suffixes[-2:]) or '(none)'!r}",
            where=path,
            fix=f"use one of {' '.join(_READERS)}, optionally followed by {' '.join(_DECOMPRESSORS)}",
        )
    fix = "check that you may read it; if it is compressed, copy or download it again"
    with (
        explained("cannot read the dataset", OSError, EOFError, lzma.LZMAError, zlib.error, where=path, fix=fix),
        explained("the dataset is not UTF-8 text", UnicodeDecodeError, where=path, fix="convert it to UTF-8"),
        path.open("rb") as raw,
    ):
        return _READERS[suffix](unpack(_DECOMPRESSORS[compression](raw), path) if compression else raw, source)


@contextmanager
def explained(what: str, *errors: type[Exception], where: object, fix: str) -> Iterator[None]:
    """Turn `errors` of a reader into a DataError that says what to do."""
    try:
        yield
    except errors as error:
        raise DataError(what, where=where, why=str(error), fix=fix) from error


def _read_jsonl(file: IO[bytes], source: str) -> Records:
    lines = enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1)
    return [_parse_line(line, f"{source}, line {number}") for number, line in lines if line.strip()]


def _parse_line(line: str, where: str) -> Record | RowError:
    try:
        return _as_record(parse_json(line), where)
    except ValueError as error:
        fix = "correct or remove the line; .jsonl holds one JSON object per line"
        return RowError("a line is not valid JSON", where=where, why=str(error), fix=fix)


def _read_json(file: IO[bytes], source: str) -> Records:
    content = file.read()
    text = content.decode("utf-8-sig")
    try:
        value = parse_json(text)
    except ValueError as error:
        if "Extra data" in str(error) and "\n" in text.strip():  # many .json files hold JSON lines
            return _read_jsonl(io.BytesIO(content), source)
        raise DataError(
            "the dataset is not valid JSON",
            where=source,
            why=str(error),
            fix="correct it at that line and column; a .json file holds one list of objects",
        ) from error
    return _as_records(value, source)


def _read_csv(file: IO[bytes], source: str) -> Records:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), restkey="", strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise DataError(
            "a line is not valid CSV",
            where=f"{source}, line {reader.reader.line_num}",
            why=str(error),
            fix='correct or remove the line; a quote inside a quoted cell is written twice: "a ""b"" c"',
        ) from error
    return [_require_width(record, f"{source}, row {number}") for number, record in enumerate(records, 1)]


def _require_width(record: Record, where: str) -> Record | RowError:
    if not isinstance(record.get(""), list):
        return record
    fix = 'put cells that contain commas or line breaks in double quotes: "a, b"'
    return RowError("the row has more cells than the header", where=where, fix=fix)


def _read_txt(file: IO[bytes], source: str) -> Records:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    return [{"prompt": line.strip()} for line in lines if line.strip()]


def _read_parquet(file: IO[bytes], source: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    fix = "download or export the file again, or store the rows as .jsonl"
    with explained("the dataset is not a readable Parquet file", pyarrow.ArrowException, where=source, fix=fix):
        return pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())).to_pylist()


def _read_pkl(file: IO[bytes], source: str) -> Records:
    return _as_records(read_pickle(file, name=source), source)


_READERS: Mapping[str, Callable[[IO[bytes], str], Records]] = {
    ".pkl": _read_pkl,
    ".pickle": _read_pkl,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_txt,
}


def _as_record(value: Any, where: str) -> Record | RowError:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        return value
    fix = 'store each row as an object such as {"prompt": "..."}'
    return RowError(f"a row is a {type(value).__name__}, expected an object with columns", where=where, fix=fix)


def _as_records(value: Any, source: str) -> Records:
    """Return the records of a list of rows, or of a mapping from column to its cells."""
    if isinstance(value, list):
        return [_as_record(row, f"{source}, row {number}") for number, row in enumerate(value, 1)]
    if not isinstance(value, dict) or not all(isinstance(cells, list | dict) for cells in value.values()):
        raise DataError(
            f"the dataset holds {type(value).__name__}, expected rows", where=source, fix="store a list of objects"
        )
    cells = [list(column.values()) if isinstance(column, dict) else column for column in value.values()]
    if len({len(column) for column in cells}) > 1:
        raise DataError(
            "the columns differ in length",
            where=source,
            why=", ".join(str(len(c)) for c in cells),
            fix="give every column one cell per row, or store a list of objects",
        )
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]


def _read_directory(path: Path, columns: Mapping[str, str]) -> Records:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        fix = "save it again with datasets' save_to_disk, or point -d at a data file such as .jsonl or .parquet"
        with explained("cannot load the dataset directory", OSError, ValueError, where=path, fix=fix):
            loaded = datasets.load_from_disk(str(path))
        return _read_dataset(loaded, str(path), columns)
    files = sorted(_data_files(path))
    train = [file for file in files if file.name.startswith("train") or file.parent.name == "train"]
    chosen = train or files
    if not chosen:
        raise DataError("the directory holds no dataset", where=path, fix=f"put files in it: {' '.join(_READERS)}")
    kinds = {(file.parent, file.suffix) for file in chosen}
    if len(kinds) > 1:
        listed = ", ".join(str(file.relative_to(path)) for file in chosen[:5])
        raise DataError("the directory holds several datasets", where=path, why=listed, fix="point -d at one of them")
    return [record for file in chosen for record in _read_file(file, str(file))]


def _data_files(path: Path) -> Iterator[Path]:
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        name = file.with_suffix("") if file.suffix in _DECOMPRESSORS else file
        if file.is_file() and not hidden and name.suffix in _READERS and file.name.lower() not in _NOT_DATA:
            yield file


def _read_hub(name: str, columns: Mapping[str, str]) -> Records:
    suffixes = {suffix.lower() for suffix in Path(name).suffixes}
    if suffixes & {*_READERS, *_DECOMPRESSORS} or not _HUB_NAME.fullmatch(name):
        raise DataError("no such dataset file", where=expand_path(name).absolute(), fix="check the path of -d")
    import datasets

    hub_id, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(hub_id, config or None)
    except Exception as error:  # the hub client raises many types: network, missing, gated, malformed
        raise DataError(
            f"cannot load {name!r}: no such file here, and the Hugging Face hub did not provide it",
            where=name,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            fix="check the name (ORG/NAME or ORG/NAME:CONFIG); without a connection, download it elsewhere and give "
            "the directory to -d, or use -d builtin",
        ) from error
    return _read_dataset(loaded, name, columns)


def _read_dataset(loaded: Any, source: str, columns: Mapping[str, str]) -> Records:
    """Return the records of a `datasets.Dataset`, or of the right split of a `DatasetDict`."""
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded), "")
        if split != "train" and len(loaded) != 1:
            raise DataError(
                "the dataset has no split 'train'",
                where=source,
                why=f"splits: {', '.join(loaded)}",
                fix="save the split you want with datasets' `save_to_disk` and give that directory to -d",
            )
        loaded = loaded[split]
    wanted = {columns.get(name, name) for name in COLUMNS}
    kept = [name for name in loaded.column_names if name in wanted]
    if not kept or not set(columns.values()) <= set(kept):
        nothing: Records = [dict.fromkeys(loaded.column_names)]
        return nothing[: len(loaded)]  # enough to say which columns there are
    return loaded.select_columns(kept).to_list()
