"""Rank files: what INC wrote is read, and what we write is what INC would have written."""

import io
import json
import pickle
import pickletools
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.layout import parse_rank_file
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet, ScaleNode
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges
from gaudi_calib.rankfiles.background import BackgroundWriter
from gaudi_calib.rankfiles.nested import Head, encode_node, encode_rank
from gaudi_calib.rankfiles.npz import load_value, read_pickle
from gaudi_calib.rankfiles.store import (
    _Renderer,
    read_node_names,
    read_ranges,
    read_scales,
    render_nested,
    write_rank_set,
)
from tests.support import hostile, paths
from tests.support.processes import run_limited

GOLDEN = paths.GOLDEN / "llama-tiny"
RUNS = [GOLDEN / run for run in ("tp1/g2", "tp1/g3", "tp2/g2", "tp1pcs/g2")]
RUNS += [GOLDEN.parent / model / "tp1/g2" for model in ("mixtral-tiny", "deepseek-v3-fp8-tiny")]
FILES = sorted(path for run in RUNS for path in run.glob("*.json") if not parse_rank_file(path.name).is_mod_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join([*path.parts[-4:-2], path.stem]))
def test_what_inc_wrote_is_written_again_byte_for_byte(path: Path, tmp_path: Path):
    """Reading and writing a real file gives the same json, the same pickled values and the same module list."""
    method = parse_rank_file(path.name).method
    rank_set = read_ranges(path) if method is None else read_scales(path)
    written = write_rank_set(tmp_path, rank_set, method=method)
    assert written[0].read_bytes() == path.read_bytes()
    ours, theirs = (np.load(file.with_suffix(".npz"), allow_pickle=True)["arr_0"].item() for file in (written[0], path))
    assert _describe(ours) == _describe(theirs)
    if method is None:
        assert json.loads(written[2].read_text()) == json.loads(path.with_name(written[2].name).read_text())


def _describe(value):
    """Structure, dtypes, shapes and values; INC itself mixes lists and tuples."""
    if isinstance(value, dict):
        return {key: _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
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
    assert {world: sorted(ranks) for world, ranks in CalibrationDir(tmp_path).worlds.items()} == {16: [0, 1, 10]}
    assert CalibrationDir(tmp_path).list_methods(16) == []


def test_files_without_rank_count_as_one_rank(tmp_path: Path):
    """Plain INC, without torch.distributed, writes no rank suffix."""
    for path in (GOLDEN / "tp1/g3").glob("*_maxabs_0_1*"):
        shutil.copy(path, tmp_path / path.name.replace("_0_1", ""))
    (rank_set,) = CalibrationDir(tmp_path).read_world(1)
    assert (rank_set.rank, rank_set.world, len(rank_set.nodes)) == (0, 1, 45)


def test_missing_rank_is_named(tmp_path: Path):
    """The error names the missing rank, its file and the worlds that are there."""
    shutil.copy(GOLDEN / "tp2/g2/inc_output_hooks_maxabs_0_2.json", tmp_path)
    with pytest.raises(FileError, match="no ranges of rank 1 of 2") as error:
        CalibrationDir(tmp_path).read_world(2)
    assert error.value.where.endswith("inc_output_hooks_maxabs_1_2.json")
    assert "world size 2" in error.value.why and "restore the files" in error.value.fix


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


READ = """
import sys
from pathlib import Path
from gaudi_calib.errors import FileError
from gaudi_calib.rankfiles.store import read_ranges
try:
    read_ranges(Path(sys.argv[1]))
except FileError as error:
    print(error)
"""


def _write_npz(path: Path, pickled: bytes, *, shape: tuple[int, ...] = (), compression: int = zipfile.ZIP_STORED):
    """Write `pickled` as the object array of an npz beside the json `path`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path.with_suffix(".npz"), "w", compression) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + pickled)


def test_a_pickle_in_an_npz_chooses_no_memory(tmp_path: Path):
    """An array of objects whose dtype says that they are plain bytes would be read as addresses."""
    path = _copy_rank(tmp_path)
    _write_npz(path, hostile.finish(hostile.array("O8", b")", b"C\x08AAAAAAAA")))
    result = run_limited(READ, path)
    assert result.returncode == 0, result
    assert "holds more than numbers and their names" in result.stdout


@pytest.mark.parametrize("name", hostile.BOMBS)
def test_a_small_npz_takes_little(tmp_path: Path, name: str):
    """What a small file claims or repeats takes neither gigabytes nor minutes, and the error says what it is."""
    opcodes, message = hostile.BOMBS[name]
    path = _copy_rank(tmp_path)
    _write_npz(path, hostile.finish(opcodes))
    result = run_limited(READ, path)
    assert message in result.stdout, result
    assert str(path.with_suffix(".npz")) in result.stdout and "fix:" in result.stdout


def test_an_npz_that_unpacks_to_gigabytes_is_refused(tmp_path: Path):
    """It is given up long before."""
    path = _copy_rank(tmp_path)
    _write_npz(path, bytes(300 << 20), compression=zipfile.ZIP_DEFLATED)
    assert path.with_suffix(".npz").stat().st_size < 1 << 20
    with pytest.raises(FileError, match="unpacks to more than"):
        read_ranges(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_npz_compressed_as_numpy_never_does_is_refused(tmp_path: Path, compression: int):
    """zipfile unpacks these whole, whatever they unpack to."""
    path = _copy_rank(tmp_path)
    _write_npz(path, b"", compression=compression)
    with pytest.raises(FileError, match="compressed in a way"):
        read_ranges(path)


@pytest.mark.parametrize("shape", [(1,), (10**12,), (10**12, 0)], ids=str)
def test_an_npz_holds_one_object(tmp_path: Path, shape: tuple[int, ...]):
    """A header that claims an array of them is refused, however large."""
    path = _copy_rank(tmp_path)
    _write_npz(path, pickle.dumps(np.array({}, dtype=object)), shape=shape)
    with pytest.raises(FileError, match="no pickled dict") as caught:
        read_ranges(path)
    assert str(shape) in caught.value.why


def test_scales_are_not_taken_for_ranges():
    """A scale file given where ranges are expected is refused."""
    with pytest.raises(FileError, match="holds Scale, expected DynamicRange"):
        read_ranges(GOLDEN / "tp1/g2/inc_output_hooks_maxabs_MAXABS_HW_0_1.json")


def _random_rank(seed: int, count: int, outputs: int = 3) -> RankSet[Node]:
    """Nodes of several shapes in random order; bfloat16 values, and a few that are not."""
    random = np.random.default_rng(seed)

    def draw(number: int) -> tuple[np.ndarray, ...]:
        values = round_to_bf16(random.lognormal(0, 9, number)) if random.random() < 0.99 else random.random(number)
        return tuple(np.float32(value).reshape(1) for value in values)

    nodes = {}
    for index in range(count):
        kinds = (
            lambda: Node(draw(1), None, draw(1)[0]),
            lambda: Node(draw(2)),
            lambda: Node(draw(1), draw(2), draw(1)[0]),
            lambda: Node(draw(1), draw(outputs)),
            lambda: Node(draw(3), draw(1)),
        )
        nodes[f"model.layers.{index}.x"] = kinds[random.integers(len(kinds))]()
    return RankSet(seed, 70000, nodes, tuple(nodes), (None, 3, 300, 70000)[seed % 4])


def test_a_small_rank_is_written_as_np_savez_writes_it(tmp_path: Path):
    """Byte for byte, the archive around it included; a larger one differs in the length of its frames alone."""
    rank_set = _random_rank(2, 40)
    _, npz, _ = write_rank_set(tmp_path, rank_set)
    nodes = {name: encode_node(node) for name, node in rank_set.nodes.items()}
    np.savez(tmp_path / "plain.npz", np.array(encode_rank(Head("DynamicRange", 2, 300), nodes), dtype=object))
    assert npz.read_bytes() == (tmp_path / "plain.npz").read_bytes()


@pytest.mark.parametrize(("count", "outputs"), [(0, 1), (1, 1), (2, 4), (999, 3), (1000, 2), (2001, 5), (40, 2003)])
@pytest.mark.parametrize("seed", range(4))
def test_fast_writing_equals_the_plain_way(seed: int, count: int, outputs: int):
    """Same text as json.dumps, same opcodes as np.savez (which only cuts them into frames), for any set of nodes."""
    rank_set = _random_rank(seed, count, outputs)
    text, npz = _Renderer("DynamicRange").render(rank_set)
    plain_text, plain_npz = render_nested(Head("DynamicRange", rank_set.rank, rank_set.num_samples), rank_set.nodes)
    assert text == plain_text
    assert _list_opcodes(npz) == _list_opcodes(plain_npz)
    assert np.load(io.BytesIO(npz), allow_pickle=True)["arr_0"].item()["LocalRank"] == seed


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_fast_writing_of_scales_equals_the_plain_way(count: int):
    """Scales: no, one, three or many inputs and outputs, with and without a weight."""
    random = np.random.default_rng(count)
    nodes = {}
    for index in range(count):
        inputs, outputs = ([float(np.float32(x)) for x in random.random(random.integers(6))] for _ in range(2))
        nodes[f"n{index}"] = ScaleNode(tuple(inputs), tuple(outputs), 0.5 if random.random() < 0.5 else None)
    rank_set = RankSet(0, 1, nodes)
    text, npz = _Renderer("Scale").render(rank_set)
    plain_text, plain_npz = render_nested(Head("Scale", 0), rank_set.nodes)
    assert text == plain_text
    assert _list_opcodes(npz) == _list_opcodes(plain_npz)


def _list_opcodes(npz: bytes) -> list[tuple]:
    with zipfile.ZipFile(io.BytesIO(npz)) as archive:
        content = archive.read("arr_0.npy")
    header, _, pickled = content.partition(b"\n")
    opcodes = [(opcode.name, value) for opcode, value, _ in pickletools.genops(pickled) if opcode.name != "FRAME"]
    return [header, *opcodes]


def test_ranks_that_differ_only_in_numbers_share_their_inventory(tmp_path: Path):
    """They are read without being parsed; the values are their own."""
    ranks = [replace(_random_rank(1, 200), rank=rank, world=2) for rank in (0, 1)]
    table = tabulate_ranges(ranks[1].nodes)
    ranks[1] = replace(ranks[1], nodes=RangeTable(table.inventory, table.numbers * 2))
    for rank in ranks:
        write_rank_set(tmp_path, rank)
    first, second = CalibrationDir(tmp_path).read_world(2)
    assert second.nodes.inventory is first.nodes.inventory
    assert np.array_equal(second.nodes.numbers, 2 * first.nodes.numbers)
    assert repr(second) == repr(ranks[1])


@pytest.mark.parametrize("fix_numbers", ["json", "npz"])
def test_one_changed_number_on_a_later_rank_is_seen(fix_numbers: str, tmp_path: Path):
    """Ranks that are read by comparing are checked as the first one is."""
    ranks = [replace(_random_rank(1, 50), rank=rank, world=2) for rank in (0, 1)]
    for rank in ranks:
        write_rank_set(tmp_path, rank)
    table = tabulate_ranges(ranks[1].nodes)
    numbers = table.numbers.copy()
    numbers[17] *= 2
    write_rank_set(tmp_path / "other", replace(ranks[1], nodes=RangeTable(table.inventory, numbers)))
    shutil.copy(tmp_path / f"other/inc_output_hooks_maxabs_1_2.{fix_numbers}", tmp_path)
    with pytest.raises(FileError, match="different values"):
        CalibrationDir(tmp_path).read_world(2)


def test_files_of_another_layout_are_read(tmp_path: Path):
    """Another indent, float64 arrays and pickle protocol 2, as older tools wrote them."""
    path = _copy_rank(tmp_path)
    expected = read_ranges(path)
    path.write_text(json.dumps(json.loads(path.read_text())))
    value = np.load(path.with_suffix(".npz"), allow_pickle=True)["arr_0"].item()
    for node in value["Nodes"].values():
        for key in ("inputs", "outputs"):
            if key in node:
                node[key] = [np.array(values, dtype=np.float64) for values in node[key]]
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path.with_suffix(".npz"), "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + pickle.dumps(np.array(value, dtype=object), protocol=2))
    assert repr(read_ranges(path)) == repr(expected)


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numbers_come_out_of_an_npz_as_they_went_in(tmp_path: Path, protocol: int, core: str):
    """Of every kind, order and protocol, under the names that NumPy 1 and 2 write."""
    order = np.arange(6, dtype="f8").reshape(2, 3)
    value = {
        "arrays": [np.float32([[1.5]]), np.asfortranarray(order), order[:, ::2], np.array(0.5), np.zeros((2, 0), "f4")],
        "scalars": (np.float32(0.25), np.float64(-1), np.int64(2**40), 0.1, 3, None, True, "x"),
        0: {1: np.arange(3), 2: np.arange(3, dtype=np.uint8)},
    }
    pickled = pickle.dumps(np.array(value, dtype=object), protocol)
    for length, name in ((22, b"multiarray"), (19, b"numeric")):  # the length stands before a name since protocol 4
        old, new = (f"numpy.{core}.".encode() + name for core in ("_core", core))
        pickled = pickled.replace(bytes([length]) + old, bytes([len(new)]) + new).replace(old, new)
    pickled = pickletools.optimize(pickled)  # cuts it into frames anew
    _write_npz(tmp_path / "a.json", pickled)
    loaded = load_value(read_pickle(tmp_path / "a.npz"), tmp_path / "a.npz")
    assert repr(_describe(loaded)) == repr(_describe(value))
    assert [*map(type, loaded["scalars"])] == [*map(type, value["scalars"])]


@pytest.mark.parametrize("numbers", [np.complex64(1), np.array(["x"]), np.array([b"x"]), np.array([None]), {1}, b"x"])
def test_nothing_but_numbers_and_their_names_comes_out_of_an_npz(tmp_path: Path, numbers):
    """Arrays of text, bytes, objects or complex numbers are no ranges."""
    _write_npz(tmp_path / "a.json", pickle.dumps({"Nodes": {"n": {"inputs": [numbers]}}}))
    with pytest.raises(FileError, match="more than numbers"):
        load_value(read_pickle(tmp_path / "a.npz"), tmp_path / "a.npz")


def test_names_of_any_alphabet_survive(tmp_path: Path):
    """Escaped in the json, UTF-8 in the pickle, also where they are long."""
    nodes = {name: Node((np.ones(1, np.float32),), None, np.ones(1, np.float32)) for name in ("λ.q", "x" * 300, '"\\')}
    for chosen in (nodes, {"λ.q": nodes["λ.q"]}):
        write_rank_set(tmp_path, RankSet(0, 1, chosen, tuple(chosen)))
        found = read_ranges(tmp_path / "inc_output_hooks_maxabs_0_1.json")
        assert repr(dict(found.nodes)) == repr(chosen) and found.modules == tuple(chosen)


@pytest.mark.parametrize(
    "node",
    [{"inputs": "x"}, {"inputs": [["x"]]}, {"inputs": [[["Infinity"]]]}, {"inputs": [[["1.5"]]]}, 3],
    ids=["text", "text in a list", "infinity as text", "number as text", "number"],
)
def test_a_malformed_node_is_named(tmp_path: Path, node):
    """Whether or not it looks like a node while it is parsed."""
    path = _copy_rank(tmp_path)
    value = json.loads(path.read_text())
    value["Nodes"]["lm_head"] = node
    path.write_text(json.dumps(value))
    with pytest.raises(FileError, match="cannot read the ranges of lm_head"):
        read_ranges(path)


@pytest.mark.parametrize("extension", [".json", ".npz"])
def test_a_number_of_samples_that_is_none_is_refused(tmp_path: Path, extension: str):
    """Written again, it would make an npz that cannot be read."""
    path = _copy_rank(tmp_path)
    content = {**json.loads(path.read_text()), "NumSamples": "x"}
    path.unlink()
    if extension == ".json":
        path.with_suffix(".npz").unlink()
        path.write_text(json.dumps(content))
    else:
        np.savez(path.with_suffix(".npz"), np.array(content, dtype=object))
    with pytest.raises(FileError, match=r"NumSamples of .* is no whole number"):
        read_ranges(path)


def test_a_module_may_have_the_name_of_a_key(tmp_path: Path):
    """`inputs` and `outputs` are names like any other."""
    nodes = {name: Node((np.ones(1, np.float32),), None, np.ones(1, np.float32)) for name in ("inputs", "outputs")}
    path, *_ = write_rank_set(tmp_path, RankSet(0, 1, nodes))
    assert read_node_names(path) == ("inputs", "outputs")
    assert repr(dict(read_ranges(path).nodes)) == repr(nodes)


def test_a_full_disk_is_reported_from_the_writing_thread(tmp_path: Path):
    """An error of the second thread reaches the caller; files after it are not tried."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileError, match="cannot write"), BackgroundWriter() as writer:
        writer.write(tmp_path / "taken" / "a", b"")
        for _ in range(10):
            writer.write(tmp_path / "b", b"")
    assert not (tmp_path / "b").exists()
