"""Rank files: what INC wrote is read, and what we write is what INC would have written."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.errors import FileError
from gaudi_calib.layout import parse_rank_file
from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet
from gaudi_calib.ranges.store import list_worlds, read_ranges, read_scales, read_world_dir, write_rank_set

GOLDEN = Path(__file__).parent / "golden" / "llama-tiny"
FILES = sorted(
    path
    for directory in ("tp1/g2", "tp1/g3", "tp2/g2", "tp1pcs/g2")
    for path in (GOLDEN / directory).glob("*.json")
    if not parse_rank_file(path.name).is_mod_list
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_what_inc_wrote_is_written_again_byte_for_byte(path: Path, tmp_path: Path):
    """Reading and writing a real file gives the same json, the same pickled values and the same module list."""
    file = parse_rank_file(path.name)
    rank_set = read_ranges(path) if file.method is None else read_scales(path)
    written = write_rank_set(tmp_path, rank_set, method=file.method)
    assert written[0].read_bytes() == path.read_bytes()
    ours, theirs = (np.load(one.with_suffix(".npz"), allow_pickle=True)["arr_0"].item() for one in (written[0], path))
    assert _describe(ours) == _describe(theirs)
    if file.method is None:
        assert json.loads(written[2].read_text()) == json.loads(path.with_name(written[2].name).read_text())


def _describe(value):
    """Structure, dtypes, shapes and values; INC itself mixes lists and tuples."""
    if isinstance(value, dict):
        return {key: _describe(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(one) for one in value]
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def test_per_channel_scales_keep_both_axes():
    """A per-channel weight scale is read as one array per output and one per input channel."""
    path = GOLDEN / "tp1pcs/g2/inc_output_hooks_maxabs_ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2_0_1.json"
    weight = read_scales(path).nodes["model.layers.0.mlp.down_proj"].weight
    assert isinstance(weight, PerChannelWeight)
    assert weight.out_channels.shape == (256,) and weight.in_channels.shape == (512,)
    assert (weight.in_channels == 1).all() and len(set(weight.out_channels.tolist())) > 1


def test_worlds_are_told_apart_by_name_not_by_substring(tmp_path: Path):
    """`_0_1` is not found in `_0_16`, and scales are not taken for ranges."""
    node = {"n": Node((np.ones(1, np.float32),))}
    for rank in (0, 1, 10):
        write_rank_set(tmp_path, RankSet(rank, 16, node))
    assert {world: sorted(ranks) for world, ranks in list_worlds(tmp_path).items()} == {16: [0, 1, 10]}
    assert list_worlds(tmp_path, "MAXABS_HW") == {}


def test_files_without_rank_count_as_one_rank(tmp_path: Path):
    """Plain INC, without torch.distributed, writes no rank suffix."""
    for path in (GOLDEN / "tp1/g3").glob("*_maxabs_0_1*"):
        shutil.copy(path, tmp_path / path.name.replace("_0_1", ""))
    (rank_set,) = read_world_dir(tmp_path, 1)
    assert (rank_set.rank, rank_set.world, len(rank_set.nodes)) == (0, 1, 45)


def test_missing_rank_is_named(tmp_path: Path):
    """The error names the missing rank, its file and the worlds that are there."""
    shutil.copy(GOLDEN / "tp2/g2/inc_output_hooks_maxabs_0_2.json", tmp_path)
    with pytest.raises(FileError, match="no ranges of rank 1 of 2") as error:
        read_world_dir(tmp_path, 2)
    assert error.value.where.endswith("inc_output_hooks_maxabs_1_2.json")
    assert "world size 2" in error.value.why and "measure -t 2" in error.value.fix


def _copy_rank(tmp_path: Path) -> Path:
    for path in (GOLDEN / "tp1/g3").glob("inc_output_hooks_maxabs_0_1*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "inc_output_hooks_maxabs_0_1.json"


def test_json_and_npz_that_disagree_are_refused(tmp_path: Path):
    """Somebody edits the json; INC would go on reading the npz."""
    path = _copy_rank(tmp_path)
    path.write_text(path.read_text().replace("4.9375", "5.0", 1))
    with pytest.raises(FileError, match="different values"):
        read_ranges(path)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".json", lambda content: content[:500], "not valid JSON"),
        (".npz", lambda content: content[:500], "damaged"),
        (".json", lambda content: b"[]", "no Nodes"),
    ],
    ids=["truncated json", "truncated npz", "another json"],
)
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, damage, message: str):
    """A damaged file is an error that names it."""
    path = _copy_rank(tmp_path)
    target = path.with_suffix(suffix)
    target.write_bytes(damage(target.read_bytes()))
    with pytest.raises(FileError, match=message) as error:
        read_ranges(path)
    assert target.name in str(error.value)


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_in_an_npz_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An npz that would run code on np.load is refused by name, and the code does not run."""
    monkeypatch.chdir(tmp_path)
    path = _copy_rank(tmp_path)
    np.savez(path.with_suffix(".npz"), np.array(_Bomb(), dtype=object))
    with pytest.raises(FileError, match=r"refused to load pathlib\.Path\.touch|refused to load builtins\.getattr"):
        read_ranges(path)
    assert not (tmp_path / "exploded").exists()
    assert pickle.dumps(_Bomb())


def test_scales_are_not_taken_for_ranges():
    """A scale file given where ranges are expected is refused."""
    with pytest.raises(FileError, match="holds Scale, expected DynamicRange"):
        read_ranges(GOLDEN / "tp1/g2/inc_output_hooks_maxabs_MAXABS_HW_0_1.json")
