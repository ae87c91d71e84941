"""The reference's steps 3, 5 and 6 against `postprocess`, `unify` and `expand`: one test per row of
docs/reference-steps.md.

Where the reference is right, `benchmarks/nested_lists.py`, which applies its rule, must give equal
values. Where it is wrong, the right answer is written out here.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import nested_lists
from gaudi_calib.cli.main import main
from tests.support import paths

GOLDEN = paths.GOLDEN / "llama-tiny"
TABLE = paths.ROOT / "docs" / "reference-steps.md"
NAN = float("nan")
ATTENTION = "model.layers.0.self_attn.attn.impl."
LATENT = "model.layers.0.self_attn.mla_attn.mla_attn.impl."
FUSED = "model.layers.0.mlp.experts.moe_op"

Nodes = dict[str, dict[str, Any]]


def node(
    inputs: Iterable[float], outputs: Iterable[float] | None = None, weight: float | None = None
) -> dict[str, Any]:
    """A node of one channel per range."""
    value: dict[str, Any] = {"inputs": [[[x]] for x in inputs]}
    if outputs is not None:
        value["outputs"] = [[[x]] for x in outputs]
    if weight is not None:
        value["params"] = {"weight": [[weight]]}
    return value


def write(directory: Path, nodes: Nodes, rank: int, world: int, *, method: str = "", dump: str = "inc_output") -> Path:
    """Write a rank file as a measurement leaves it, and for ranges its list of modules."""
    directory.mkdir(parents=True, exist_ok=True)
    tag = f"_{method}" if method else ""
    content = {"GlobalRank": None, "LocalRank": rank, "Mode": "Scale" if method else "DynamicRange", "Nodes": nodes}
    path = directory / f"{dump}_hooks_maxabs{tag}_{rank}_{world}.json"
    path.write_text(json.dumps(content, indent=4))
    if not method:
        path.with_name(f"{path.stem}_mod_list.json").write_text(json.dumps(list(nodes)))
    return directory


def write_world(directory: Path, ranks: Iterable[Nodes], **arguments: str) -> Path:
    ranks = list(ranks)
    for rank, nodes in enumerate(ranks):
        write(directory, nodes, rank, len(ranks), **arguments)
    return directory


def write_inputs(directory: Path, *values: float) -> Path:
    """One node `a` with one input; one rank per value."""
    return write_world(directory, ({"a": node([value])} for value in values))


def read(directory: Path, rank: int, world: int, dump: str = "inc_output") -> Nodes:
    """Return what the json and the npz of a rank hold; they must agree."""
    path = directory / f"{dump}_hooks_maxabs_{rank}_{world}.json"
    shown = json.loads(path.read_text())["Nodes"]
    loaded = np.load(path.with_suffix(".npz"), allow_pickle=True)["arr_0"].item()["Nodes"]
    np.testing.assert_equal(to_lists(loaded), to_lists(shown))
    return to_lists(loaded)


def to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: to_lists(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_lists(one) for one in value]
    return np.float32(value).tolist()


def run(*words: object, code: int = 0) -> None:
    assert main([str(word) for word in words]) == code


def list_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def make_dense(seed: int, world: int, layers: int = 3) -> list[Nodes]:
    """Random ranges of a dense model; bf16 values, as INC records."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> list[float]:
        return (random.integers(1, 256, count) / 8).tolist()

    ranks: list[Nodes] = []
    for _ in range(world):
        nodes: Nodes = {}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            nodes[prefix + "self_attn.qkv_proj"] = node(draw(1), None, *draw(1))
            nodes[prefix + "self_attn.o_proj"] = node(draw(1), draw(2), *draw(1))
            nodes[prefix + "self_attn.attn.impl.matmul_qk"] = node(draw(2))
            nodes[prefix + "self_attn.attn.impl.batch2block_matmul"] = node(draw(2), draw(1))
            nodes[prefix + "self_attn.attn.impl.fused_scaled_dot_product_attention"] = node(draw(3), draw(2))
        ranks.append(nodes)
    return ranks


def make_experts(
    seed: int, world: int, local: int, *, idle: Iterable[tuple[int, int]] = (), layers: int = 2
) -> list[Nodes]:
    """Random ranges of a model with experts; `idle` are the (rank, local expert) without a token."""
    random = np.random.default_rng(seed)
    ranks = make_dense(seed, world, layers)
    for rank, nodes in enumerate(ranks):
        for layer in range(layers):
            op = FUSED.replace(".0.", f".{layer}.")
            maxima = (random.integers(1, 256, local + 1) / 8).tolist()
            for where, expert in idle:
                if where == rank:
                    maxima[1 + expert] = 0.0
            nodes[f"model.layers.{layer}.mlp.gate"] = node([1.0 + rank], None, 0.5)
            nodes[op] = node([2.0 + rank], maxima)
            for kind in ("w13_list", "w2_list"):
                for expert in range(local):
                    nodes[f"{op}.{kind}.{expert}"] = node([0.0], None, float(random.integers(1, 256)) / 8)
    return ranks


def assert_equal_to_the_rule(
    directory: Path, out: Path, world: int, rule: Callable[..., None], **arguments: Any
) -> None:
    """What is in `out` equals what the reference's rule makes of `directory`."""
    rule(directory, world, out / "rule", **arguments)
    for rank in range(world):
        assert read(out, rank, world) == read(out / "rule", rank, world)


# Step 3.


def attention_nodes(prefix: str = ATTENTION) -> Nodes:
    """Matmuls that saw less than the caches they read."""
    nodes = {"matmul_qk": node([1, 2]), "matmul_av": node([3, 4]), "k_cache": node([8]), "v_cache": node([16])}
    return {prefix + name: one for name, one in nodes.items()}


def test_step3_caches_into_matmuls(tmp_path: Path):
    run("postprocess", "-m", write_world(tmp_path / "in", [attention_nodes()]), "-o", tmp_path)
    expected = {"matmul_qk": node([1, 8]), "matmul_av": node([3, 16]), "k_cache": node([8]), "v_cache": node([16])}
    assert read(tmp_path, 0, 1) == {ATTENTION + name: to_lists(one) for name, one in expected.items()}
    run("postprocess", "-m", GOLDEN / "tp1" / "g2", "-o", tmp_path / "golden")
    assert read(tmp_path / "golden", 0, 1) == read(GOLDEN / "postprocessed", 0, 1)


def test_step3_in_place(tmp_path: Path):
    write_world(tmp_path, [attention_nodes()])
    for _ in range(2):
        run("postprocess", "-m", tmp_path, "-o", tmp_path)
        assert read(tmp_path, 0, 1)[ATTENTION + "matmul_qk"] == node([1, 8])


def test_step3_latent_cache_without_a_flag(tmp_path: Path):
    nodes = {"matmul_qk": node([1, 2]), "matmul_av": node([3, 4]), "latent_cache_k": node([8])}
    latent = {LATENT + name: one for name, one in nodes.items()}
    run("postprocess", "-m", write_world(tmp_path / "in", [{**latent, **attention_nodes()}]), "-o", tmp_path)
    result = read(tmp_path, 0, 1)
    assert result[LATENT + "matmul_qk"] == node([1, 8]) and result[LATENT + "matmul_av"] == node([3, 8])
    assert result[ATTENTION + "matmul_av"] == node([3, 16])


@pytest.mark.parametrize("prefix", ["model.layers.5.self_attn.attn.impl.", f"language_model.{ATTENTION}"])
def test_step3_any_layer_of_any_model(prefix: str, tmp_path: Path):
    run("postprocess", "-m", write_world(tmp_path / "in", [attention_nodes(prefix)]), "-o", tmp_path)
    assert read(tmp_path, 0, 1)[prefix + "matmul_qk"] == node([1, 8])


@pytest.mark.parametrize("lacking", ["k_cache", "matmul_qk"])
def test_step3_a_node_is_not_there(lacking: str, tmp_path: Path):
    nodes = attention_nodes()
    del nodes[ATTENTION + lacking]
    run("postprocess", "-m", write_world(tmp_path / "in", [nodes]), "-o", tmp_path)
    result = read(tmp_path, 0, 1)
    assert list(result) == list(nodes) and result[ATTENTION + "matmul_av"] == node([3, 16])
    assert lacking == "matmul_qk" or result[ATTENTION + "matmul_qk"] == node([1, 2])


def test_step3_stray_json(tmp_path: Path):
    write_world(tmp_path, [attention_nodes()])
    (tmp_path / "notes.json").write_text('{"by": "hand"}')
    run("postprocess", "-m", tmp_path)
    assert json.loads((tmp_path / "notes.json").read_text()) == {"by": "hand"}
    assert read(tmp_path, 0, 1)[ATTENTION + "matmul_qk"] == node([1, 8])


def test_step3_scales_are_not_edited(tmp_path: Path):
    scales = {ATTENTION + "matmul_qk": {"inputs": [1.0, 0.5], "outputs": [0.5], "params": {}}}
    write(write_world(tmp_path, [attention_nodes()]), scales, 0, 1, method="MAXABS_HW")
    before = (tmp_path / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").read_text()
    run("postprocess", "-m", tmp_path, "-o", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*MAXABS*"))
    assert (tmp_path / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").read_text() == before


def test_step3_module_list_travels(tmp_path: Path):
    write_world(tmp_path / "in", [attention_nodes()] * 2)
    run("postprocess", "-m", tmp_path / "in", "-o", tmp_path / "out")
    run("unify", "-m", tmp_path / "out", "-r", 1, "-o", tmp_path)
    assert read(tmp_path, 0, 1)[ATTENTION + "matmul_qk"] == node([1, 8])


# Step 5.


@pytest.mark.parametrize(("source", "world"), [(2, 1), (8, 1), (8, 2), (8, 4), (6, 3)])
def test_step5_dense(source: int, world: int, tmp_path: Path):
    write_world(tmp_path / "in", make_dense(source + world, source))
    run("unify", "-m", tmp_path / "in", "-r", world, "-o", tmp_path)
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, world, nested_lists.unify, scales=False)


def test_step5_real_files(tmp_path: Path):
    run("unify", "-m", GOLDEN / "tp2" / "g2", "-r", 1, "-o", tmp_path)
    assert_equal_to_the_rule(GOLDEN / "tp2" / "g2", tmp_path, 1, nested_lists.unify, scales=False)


@pytest.mark.parametrize(("source", "world"), [(2, 1), (4, 2)])
def test_step5_tensor_parallel_experts(source: int, world: int, tmp_path: Path):
    write_world(tmp_path / "in", make_experts(1, source, 4))
    run("unify", "-m", tmp_path / "in", "-r", world, "-o", tmp_path, "--no-expert-parallel")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, world, nested_lists.unify)


@pytest.mark.parametrize(("source", "world"), [(2, 1), (8, 1), (8, 2)])
def test_step5_expert_parallel(source: int, world: int, tmp_path: Path):
    write_world(tmp_path / "in", make_experts(2, source, 3))
    run("unify", "-m", tmp_path / "in", "-r", world, "-o", tmp_path, "-u")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, world, nested_lists.unify, expert_parallel=True)


def test_step5_expert_parallel_and_the_flag_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Idle experts tell which it is; where nothing tells, nothing is merged."""
    write_world(tmp_path / "in", make_experts(3, 4, 3, idle=[(1, 2)]))
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path)
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, 1, nested_lists.unify, expert_parallel=True)
    write_world(tmp_path / "warm", make_experts(4, 4, 3))
    run("unify", "-m", tmp_path / "warm", "-r", 1, "-o", tmp_path / "out", code=1)
    assert "--expert-parallel" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def test_step5_expert_parallel_flag_on_a_dense_model(tmp_path: Path):
    write_world(tmp_path / "in", make_dense(5, 2))
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path, "-u")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, 1, nested_lists.unify, expert_parallel=True)


def test_step5_expert_parallel_flag_on_slices(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The same three of eight experts are idle on all four ranks: each rank holds slices of the same experts."""
    idle = [(rank, expert) for rank in range(4) for expert in (1, 4, 6)]
    write_world(tmp_path / "in", make_experts(16, 4, 8, idle=idle))
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", "-u", code=1)
    assert "the same experts are idle everywhere" in capsys.readouterr().err and list_files(tmp_path / "out") == []
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path / "out", 1, nested_lists.unify)


@pytest.mark.parametrize("local", [(2, 3), (3, 2)])
def test_step5_uneven_experts(local: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture):
    for rank, count in enumerate(local):
        write(tmp_path / "in", make_experts(6, 2, count)[rank], rank, 2)
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", "-u", code=1)
    assert "experts" in capsys.readouterr().err and list_files(tmp_path / "out") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_step5_node_missing_on_a_rank(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    ranks = [{"a": node([1]), "b": node([2])} for _ in range(2)]
    del ranks[rank]["b"]
    run("unify", "-m", write_world(tmp_path / "in", ranks), "-r", 1, "-o", tmp_path / "out", code=1)
    assert f"rank {rank} of 2 has no node 'b'" in capsys.readouterr().err and list_files(tmp_path / "out") == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_step5_nan_on_a_rank(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    directory = write_inputs(tmp_path / "in", *(NAN if one == rank else 1.0 for one in range(3)))
    run("unify", "-m", directory, "-r", 1, "-o", tmp_path / "out", code=1)
    error = capsys.readouterr().err
    assert " of a is not finite" in error and f"rank {rank} of 3" in error and list_files(tmp_path / "out") == []


def test_step5_another_number_of_inputs(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_world(tmp_path / "in", [{"a": node([1])}, {"a": node([2, 9])}])
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", code=1)
    assert "a has a different number" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def test_step5_channels_of_outputs(tmp_path: Path):
    ranks = [{"a": {"inputs": [[[x], [y]]], "outputs": [[[x], [y]]]}} for x, y in ((4.0, 2.0), (1.0, 5.0))]
    run("unify", "-m", write_world(tmp_path / "in", ranks), "-r", 1, "-o", tmp_path)
    assert read(tmp_path, 0, 1) == {"a": {"inputs": [[[4], [5]]], "outputs": [[[4], [5]]]}}


def test_step5_stray_json(tmp_path: Path):
    write_inputs(tmp_path, 1, 2)
    (tmp_path / "notes_0_3.json").write_text("{}")
    run("unify", "-m", tmp_path, "-r", 1)
    assert read(tmp_path, 0, 1) == {"a": node([2])}


def test_step5_rank_missing(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_inputs(tmp_path / "in", *range(1, 9))
    (tmp_path / "in" / "inc_output_hooks_maxabs_7_8.json").unlink()
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", code=1)
    assert "rank 7 of 8" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def test_step5_several_worlds_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_inputs(write_inputs(tmp_path, 1, 2), 3, 4, 5, 6)
    run("unify", "-m", tmp_path, "-r", 1, "-o", tmp_path / "out", code=1)
    assert "--from-world" in capsys.readouterr().err and list_files(tmp_path / "out") == []
    for source, largest in ((2, 2), (4, 6)):
        run("unify", "-m", tmp_path, "-r", 1, "--from-world", source, "-o", tmp_path / "out")
        assert read(tmp_path / "out", 0, 1) == {"a": node([largest])}


def test_step5_in_place_and_again(tmp_path: Path):
    """The merged ranks lie beside the others; both worlds give the same single rank, so none need be named."""
    write_inputs(tmp_path, 1, 2, 3, 4)
    run("unify", "-m", tmp_path, "-r", 2, "-o", tmp_path)
    assert [read(tmp_path, rank, 2) for rank in range(2)] == [{"a": node([2])}, {"a": node([4])}]
    run("unify", "-m", tmp_path, "-r", 1, "-o", tmp_path)
    assert read(tmp_path, 0, 1) == {"a": node([4])}


def test_step5_what_was_unified_is_unified_again(tmp_path: Path):
    write_inputs(tmp_path / "4", 1, 2, 3, 4)
    run("unify", "-m", tmp_path / "4", "-r", 2, "-o", tmp_path / "2")
    run("unify", "-m", tmp_path / "2", "-r", 1, "-o", tmp_path / "1")
    assert read(tmp_path / "1", 0, 1) == {"a": node([4])}
    assert json.loads((tmp_path / "1" / "inc_output_hooks_maxabs_0_1_mod_list.json").read_text()) == ["a"]
    nested_lists.unify(tmp_path / "4", 2, tmp_path / "foreign")
    run("unify", "-m", tmp_path / "foreign", "-r", 1, "-o", tmp_path / "again")
    assert read(tmp_path / "again", 0, 1) == {"a": node([4])}


def test_step5_local_rank_of_a_single_rank(tmp_path: Path):
    """The reference writes -1 into a unified file, we write 0; INC reads neither, and both are read here."""
    write_inputs(tmp_path / "in", 1, 2)
    nested_lists.unify(tmp_path / "in", 1, tmp_path / "foreign")
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "ours")
    ranks = []
    for directory in (tmp_path / "foreign", tmp_path / "ours"):
        ranks.append(json.loads((directory / "inc_output_hooks_maxabs_0_1.json").read_text())["LocalRank"])
        run("expand", "-m", directory, "-w", 2, "-o", directory)
        assert read(directory, 1, 2) == {"a": node([2])}
    assert ranks == [-1, 0]


@pytest.mark.parametrize("world", [3, 4, 8])
def test_step5_rank_that_does_not_divide(world: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_inputs(tmp_path / "in", 1, 2, 3, 4)
    run("unify", "-m", tmp_path / "in", "-r", world, "-o", tmp_path / "out", code=1)
    assert f"unify into {world}" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def scale_node(outputs: list[float], weight: Any = 1.0) -> Nodes:
    return {"a": {"inputs": [1.0], "outputs": outputs, "params": {"weight": weight}}}


def read_scales(directory: Path) -> Nodes:
    return json.loads((directory / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").read_text())["Nodes"]


def test_step5_scales_of_a_fresh_run(tmp_path: Path):
    """Computed from the merged ranges, they are those that merging gives."""
    run("unify", "-m", GOLDEN / "tp2" / "g2", "-r", 1, "-o", tmp_path)
    nested_lists.unify(GOLDEN / "tp2" / "g2", 1, tmp_path / "rule")
    assert read_scales(tmp_path) == read_scales(tmp_path / "rule")


def test_step5_scales_that_do_not_fit_the_ranges(tmp_path: Path):
    """One rank's scales are left over from a run with other ranges: a maximum would keep them."""
    directory = tmp_path / "g2"
    shutil.copytree(GOLDEN / "tp2" / "g2", directory)
    stale = directory / "inc_output_hooks_maxabs_MAXABS_HW_0_2.json"
    content = json.loads(stale.read_text())
    for one in content["Nodes"].values():
        one["inputs"] = [16.0] * len(one["inputs"])
    stale.write_text(json.dumps(content))
    stale.with_suffix(".npz").unlink()
    run("unify", "-m", directory, "-r", 1, "-o", tmp_path / "ours")
    run("unify", "-m", GOLDEN / "tp2" / "g2", "-r", 1, "-o", tmp_path / "right")
    assert read_scales(tmp_path / "ours") == read_scales(tmp_path / "right")


PER_CHANNEL = "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2"


@pytest.mark.parametrize("methods", [("UNIT_SCALE",), (PER_CHANNEL,), ("MAXABS_HW", "MAXABS_POW2")], ids=str)
def test_step5_scale_files_of_any_method_do_not_disturb(methods: tuple[str, ...], tmp_path: Path):
    write_inputs(tmp_path / "in", 1, 2)
    for rank in range(2):
        for method in methods:
            weight = {"0": [1.0], "1": [1.0]} if method == PER_CHANNEL else 1.0
            write(tmp_path / "in", scale_node([1.0], weight), rank, 2, method=method)
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", "-s")
    assert read(tmp_path / "out", 0, 1) == {"a": node([2])}


def test_step5_any_dump_name(tmp_path: Path):
    write_world(tmp_path / "in", [{"a": node([1])}, {"a": node([2])}], dump="my-run.1")
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out")
    assert read(tmp_path / "out", 0, 1, "my-run.1") == {"a": node([2])}


@pytest.mark.parametrize("command", [("unify", "-r", 1), ("expand", "-w", 2), ("postprocess",)], ids=lambda one: one[0])
def test_relative_and_nested_paths(command: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_inputs(tmp_path / "here" / "in", *([1] if command[0] == "expand" else [1, 2]))
    monkeypatch.chdir(tmp_path / "here")
    run(*command, "-m", "in", "-o", "new/deeper/out")
    assert list_files(tmp_path / "here" / "new" / "deeper" / "out")


def test_step5_a_failing_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The last rank of the second group is damaged: the first group's files must not appear either."""
    write_inputs(tmp_path / "in", 1, 2, 3, 4)
    (tmp_path / "in" / "inc_output_hooks_maxabs_3_4.json").write_text('{"Nodes": {')
    run("unify", "-m", tmp_path / "in", "-r", 2, "-o", tmp_path / "out", code=1)
    assert "inc_output_hooks_maxabs_3_4.json" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def test_step5_json_and_npz_disagree(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_inputs(tmp_path / "in", 1, 2)
    value = {"Mode": "DynamicRange", "Nodes": {"a": {"inputs": [np.float32([[7]])]}}}
    np.savez(tmp_path / "in" / "inc_output_hooks_maxabs_1_2.npz", np.array(value, dtype=object))
    run("unify", "-m", tmp_path / "in", "-r", 1, "-o", tmp_path / "out", code=1)
    assert "different values" in capsys.readouterr().err and list_files(tmp_path / "out") == []


@pytest.mark.parametrize("command", [("unify", "-r", 1), ("expand", "-w", 2)], ids=lambda one: one[0])
def test_npz_holds_what_inc_writes(command: tuple, tmp_path: Path):
    write_inputs(tmp_path / "in", *([1] if command[0] == "expand" else [1, 2]))
    run(*command, "-m", tmp_path / "in", "-o", tmp_path / "out")
    for path in (tmp_path / "out").glob("*.npz"):
        (value,) = np.load(path, allow_pickle=True)["arr_0"].item()["Nodes"]["a"]["inputs"]
        assert value.dtype == np.float32 and value.shape == (1, 1)


# Step 6.


@pytest.mark.parametrize("world", [1, 2, 16])
def test_step6_dense(world: int, tmp_path: Path):
    write_world(tmp_path / "in", make_dense(7, 1))
    run("expand", "-m", tmp_path / "in", "-w", world, "-o", tmp_path)
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, world, nested_lists.expand)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_step6_expert_parallel(world: int, tmp_path: Path):
    """Everything but the lists of experts, which the reference leaves as they are."""
    write_world(tmp_path / "in", make_experts(8, 1, 8))
    run("expand", "-m", tmp_path / "in", "-w", world, "-o", tmp_path, "-u")
    nested_lists.expand(tmp_path / "in", world, tmp_path / "rule", expert_parallel=True)
    for rank in range(world):
        expected = {name: one for name, one in read(tmp_path / "rule", rank, world).items() if "_list." not in name}
        assert {name: one for name, one in read(tmp_path, rank, world).items() if "_list." not in name} == expected


def test_step6_lists_of_experts_are_dealt_out_too(tmp_path: Path):
    """Expert 0 of rank 1 is expert 4 of the model, and rank 1 has no expert 4."""
    write_world(tmp_path / "in", make_experts(9, 1, 8))
    run("expand", "-m", tmp_path / "in", "-w", 2, "-o", tmp_path, "-u")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, 2, nested_lists.expand, expert_parallel=True, slice_lists=True)
    whole, part = read(tmp_path / "rule", 0, 2), read(tmp_path, 1, 2)
    assert whole.keys() == part.keys() and f"{FUSED}.w2_list.4" not in part
    assert part[f"{FUSED}.w13_list.0"] == make_experts(9, 1, 8)[0][f"{FUSED}.w13_list.4"]


def test_step6_tensor_parallel_experts(tmp_path: Path):
    write_world(tmp_path / "in", make_experts(10, 1, 6))
    run("expand", "-m", tmp_path / "in", "-w", 4, "-o", tmp_path, "--no-expert-parallel")
    assert_equal_to_the_rule(tmp_path / "in", tmp_path, 4, nested_lists.expand)


@pytest.mark.parametrize("world", [3, 16])
def test_step6_experts_that_do_not_divide(world: int, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_world(tmp_path / "in", make_experts(11, 1, 8))
    run("expand", "-m", tmp_path / "in", "-w", world, "-o", tmp_path / "out", "-u", code=1)
    assert f"8 experts do not divide over {world} ranks" in capsys.readouterr().err
    assert list_files(tmp_path / "out") == []


def test_step6_layers_with_different_numbers_of_experts(tmp_path: Path):
    nodes = make_experts(12, 1, 4, layers=1)[0]
    other = {name.replace("layers.0", "layers.1"): one for name, one in make_experts(13, 1, 2, layers=1)[0].items()}
    run("expand", "-m", write_world(tmp_path / "in", [{**nodes, **other}]), "-w", 2, "-o", tmp_path, "-u")
    result = read(tmp_path, 1, 2)
    for op, local, source in ((FUSED, 2, nodes), (FUSED.replace(".0.", ".1."), 1, other)):
        outputs = to_lists(source[op]["outputs"])
        assert result[op]["outputs"] == [outputs[0], *outputs[1 + local :]]


def test_step6_router_gate_with_moe_in_its_name(tmp_path: Path):
    gate = {"model.layers.0.block_sparse_moe.gate": node([1], None, 2)}
    run(
        "expand",
        "-m",
        write_world(tmp_path / "in", [{**make_experts(14, 1, 4)[0], **gate}]),
        "-w",
        2,
        "-o",
        tmp_path,
        "-u",
    )
    for rank in range(2):
        assert read(tmp_path, rank, 2)["model.layers.0.block_sparse_moe.gate"] == node([1], None, 2)


def test_step6_world_1_is_not_world_16(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_inputs(tmp_path / "in", *range(10, 26))
    run("expand", "-m", tmp_path / "in", "-w", 2, "-o", tmp_path / "out", code=1)
    assert "world" in capsys.readouterr().err and list_files(tmp_path / "out") == []
    write_inputs(tmp_path / "in", 1)
    run("expand", "-m", tmp_path / "in", "-w", 2, "-o", tmp_path / "out")
    assert [read(tmp_path / "out", rank, 2) for rank in range(2)] == [{"a": node([1])}] * 2


def test_step6_no_single_rank(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path / "in", {"a": node([1])}, 0, 3)
    run("expand", "-m", tmp_path / "in", "-w", 2, "-o", tmp_path / "out", code=1)
    assert "fix:" in capsys.readouterr().err and list_files(tmp_path / "out") == []


def test_step6_scale_files_are_not_taken_for_ranges(tmp_path: Path):
    write(write_inputs(tmp_path / "in", 3), scale_node([1.0]), 0, 1, method="HW_ALIGNED_SINGLE_SCALE")
    run("expand", "-m", tmp_path / "in", "-w", 2, "-o", tmp_path / "out", "-s")
    assert read(tmp_path / "out", 1, 2) == {"a": node([3])}


def test_step6_nan_is_not_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    """That of a range that scales come from; nobody reads the second output of a row-parallel layer."""
    run("expand", "-m", write_inputs(tmp_path / "in", NAN), "-w", 2, "-o", tmp_path / "out", code=1)
    assert " of a is not finite" in capsys.readouterr().err and list_files(tmp_path / "out") == []
    write_world(tmp_path / "row", [{"model.layers.0.self_attn.o_proj": node([1], [2, NAN], 1)}])
    run("expand", "-m", tmp_path / "row", "-w", 2, "-o", tmp_path / "out")
    handed_on = read(tmp_path / "out", 1, 2)["model.layers.0.self_attn.o_proj"]
    np.testing.assert_equal(handed_on, node([1], [2, NAN], 1))


def test_step6_what_was_expanded_is_unified_again(tmp_path: Path):
    write_world(tmp_path / "in", make_experts(15, 1, 4, idle=[(0, 3)]))
    run("expand", "-m", tmp_path / "in", "-w", 4, "-o", tmp_path / "4", "-u")
    run("unify", "-m", tmp_path / "4", "-r", 1, "-o", tmp_path / "1")
    assert read(tmp_path / "1", 0, 1) == to_lists(make_experts(15, 1, 4, idle=[(0, 3)])[0])


# The table.


def test_every_row_has_a_test_and_every_test_a_row():
    """docs/reference-steps.md names the test of each row, and no test is left out."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "`test_" in line]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert all(len(names) == 1 for names in named)
    tests = {name for name in globals() if name.startswith("test_")} - {
        test_every_row_has_a_test_and_every_test_a_row.__name__
    }
    assert sorted(name for (name,) in named) == sorted(tests)
