"""Conversions are written file by file, compared, continued, and never half done; shown with the one for Gaudi 2."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gaudi_calib.checkpoints import gaudi2, writer
from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.gaudi2 import Gaudi2Converter, plan_gaudi2
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.models.headers import Header, Span, read_header
from tests.support.files import snapshot
from tests.support.fp8_models import convert, make_tensors, save_model

pytestmark = pytest.mark.torch

RECORD = Gaudi2Converter.record_name


def test_every_other_file_travels(tmp_path: Path) -> None:
    """Tokenizer, template, code, index and subdirectories are byte-identical; a download cache is left behind."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    before = snapshot(source)
    plan, _ = convert(source, tmp_path / "out")
    after = snapshot(tmp_path / "out")
    assert snapshot(source) == before
    assert set(after) == {name for name in before if not name.startswith(".cache")} | {RECORD}
    assert {name for name in before if name in after and before[name] != after[name]} == set(plan.shards)
    assert "extra/a/b.txt" in after and "model.safetensors.index.json" in after


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache holds links to blobs; the result holds files."""
    blobs = save_model(tmp_path / "blobs", make_tensors())
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    convert(source, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {"tokenizer.json", "extra/a/b.txt", "model.safetensors"} <= set(snapshot(tmp_path / "out"))


def test_headers_keep_their_metadata(tmp_path: Path) -> None:
    """`format` and whatever else a weight file says of itself is still there, as is the order of its tensors."""
    metadata = {"format": "pt", "made_by": "someone"}
    source = save_model(tmp_path / "source", make_tensors(), metadata=metadata)
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    spans = [read_header(directory / "model.safetensors").spans for directory in (source, tmp_path / "out")]
    assert spans[0] == spans[1]


@pytest.mark.parametrize("place", [".", "inside", "inside/deep"])
def test_an_output_in_the_source_is_refused(place: str, tmp_path: Path) -> None:
    """The source stays as it is, whatever happens."""
    source = save_model(tmp_path / "source", make_tensors())
    with pytest.raises(UsageError, match="inside the checkpoint"):
        plan_gaudi2(source, source / place)


def test_an_output_with_other_files_is_refused(tmp_path: Path) -> None:
    """Neither somebody's directory nor the conversion of another checkpoint is written into."""
    source = save_model(tmp_path / "source", make_tensors())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        plan_gaudi2(source, tmp_path / "out")
    other = save_model(tmp_path / "other", make_tensors())
    convert(other, tmp_path / "converted")
    with pytest.raises(FileError, match="another checkpoint"):
        plan_gaudi2(source, tmp_path / "converted")


def test_a_second_call_does_what_is_missing(tmp_path: Path) -> None:
    """Files that are done are kept; one that is missing or damaged, or whose source is new, is made again."""
    source = save_model(tmp_path / "source", make_tensors(), shards=3)
    plan, counts = convert(source, tmp_path / "out")
    complete = snapshot(tmp_path / "out")
    one, two, three = (tmp_path / "out" / name for name in plan.shards)
    kept = two.stat().st_ino
    one.unlink()
    three.write_bytes(three.read_bytes()[:-1])
    assert convert(source, tmp_path / "out")[1] == counts
    after = snapshot(tmp_path / "out")
    assert {name for name in after if after[name] != complete[name]} <= {RECORD}
    assert two.stat().st_ino == kept
    os.utime(source / two.name, ns=(1, 1))
    convert(source, tmp_path / "out")
    assert two.stat().st_ino != kept


def test_a_killed_call_is_continued(tmp_path: Path) -> None:
    """After a kill in the middle the source is as it was, no half file is in place, and a second call completes."""
    source = save_model(tmp_path / "source", make_tensors(12), shards=6)
    before = snapshot(source)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from gaudi_calib.checkpoints import gaudi2, writer\n"
        "halve = gaudi2.halve\n"
        "def slow(chunk):\n    time.sleep(0.2)\n    return halve(chunk)\n"
        "gaudi2.halve = slow\n"
        "writer.run_conversion(gaudi2.plan_gaudi2(Path(sys.argv[1]), Path(sys.argv[2])))\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    deadline = time.monotonic() + 60
    while not (out / shards[1]).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    present = [name for name in shards if (out / name).exists()]
    assert 2 <= len(present) < len(shards)
    assert json.loads((out / RECORD).read_text())["status"] == "running"
    inode = (out / shards[0]).stat().st_ino
    convert(source, out)
    convert(source, tmp_path / "whole")
    first, second = snapshot(out), snapshot(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {RECORD}
    assert json.loads((out / RECORD).read_text())["status"] == "ok"
    assert (out / shards[0]).stat().st_ino == inode
    assert not list(out.glob(".staging*")) and snapshot(source) == before


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("model.layers.0.mlp.up_proj.weight", 200),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", 3),
        ("model.layers.0.self_attn.o_proj.weight", 11),
    ],
    ids=["halved", "doubled", "copied"],
)
def test_one_wrong_byte_is_found(name: str, byte: int, tmp_path: Path) -> None:
    """The comparison reads what is on the disk; a file with a mistake never gets its name."""
    source = save_model(tmp_path / "source", make_tensors(1))
    plan, _ = convert(source, tmp_path / "out")
    written = tmp_path / "out" / "model.safetensors"
    writer.compare_shard(plan, "model.safetensors", written)
    span = next(span for span in read_header(written).spans if span.name == name)
    content = bytearray(written.read_bytes())
    content[span.start + byte] ^= 0x04
    written.write_bytes(content)
    with pytest.raises(FileError, match=f"'{name}' of model.safetensors is not what was written"):
        writer.compare_shard(plan, "model.safetensors", written)


def test_a_file_that_was_written_wrong_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is compared before it gets its name."""
    source = save_model(tmp_path / "source", make_tensors())
    monkeypatch.setattr(gaudi2, "halve", lambda chunk: chunk)
    with pytest.raises(FileError, match="is not what was written"):
        convert(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORD]


def test_memory_is_a_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many chunks is converted piece by piece, to the same result."""
    source = save_model(tmp_path / "source", make_tensors())
    convert(source, tmp_path / "whole")
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1000)
    seen: list[int] = []
    halve = gaudi2.halve
    monkeypatch.setattr(gaudi2, "halve", lambda chunk: seen.append(len(chunk)) or halve(chunk))
    convert(source, tmp_path / "pieces")
    assert max(seen) == 1000 and len(seen) > 100
    assert snapshot(tmp_path / "pieces")["model.safetensors"] == snapshot(tmp_path / "whole")["model.safetensors"]


class Narrower:
    """Turns float32 into bf16 and adds how often it did: types, sizes and the set of tensors change."""

    record_name = "narrow.json"

    def __init__(self, scratch: Path):
        self.scratch = scratch / "planned.safetensors"

    def plan_header(self, header: Header) -> Header:
        dtypes = {"F32": torch.bfloat16, "BF16": torch.bfloat16, "I64": torch.int64}
        tensors = {span.name: torch.empty(span.shape, dtype=dtypes[span.dtype]) for span in header.spans}
        save_file(tensors | {"narrowed": torch.empty(1, dtype=torch.int64)}, self.scratch, metadata=header.metadata)
        return read_header(self.scratch)

    def convert(self, source: Path, span: Span, counts: Counter[str]) -> Iterator[bytes]:
        if span.name == "narrowed":
            yield (7).to_bytes(8, "little")
            return
        tensor = load_file(source)[span.name]
        counts["narrowed"] += tensor.dtype == torch.float32
        yield (tensor.bfloat16() if tensor.dtype == torch.float32 else tensor).view(torch.uint8).numpy().tobytes()

    def is_converted(self, name: str, old: torch.Tensor | None, new: torch.Tensor) -> bool:
        return bool(new[0] == 7) if old is None else torch.equal(old.to(new.dtype), new)

    def change_file(self, path: Path) -> Any | None:
        return {"narrow": True} if path.name == "config.json" else None


def test_a_conversion_may_change_types_and_sizes_and_add_tensors(tmp_path: Path) -> None:
    """The plan has the sizes of the result; what is written is what it says."""
    tensors = {"a": torch.randn(30, 20), "b": torch.randn(8).bfloat16(), "c": torch.arange(3), "d": torch.randn(5)}
    source = save_model(tmp_path / "source", tensors)
    plan = writer.plan_conversion(Checkpoint(source), tmp_path / "out", Narrower(tmp_path))
    assert writer.run_conversion(plan) == {"narrowed": 2}
    path = tmp_path / "out" / "model.safetensors"
    assert path.stat().st_size == plan.shards["model.safetensors"].file_bytes < (source / path.name).stat().st_size
    expected = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    written = load_file(path)
    assert written.keys() == expected.keys() | {"narrowed"} and written["narrowed"].item() == 7
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"narrow": True}
    assert writer.run_conversion(plan) == {"narrowed": 2}


def test_bytes_that_are_not_as_planned_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that yields too few of them leaves no file."""
    source = save_model(tmp_path / "source", {"a": torch.randn(4, 4)})
    plan = writer.plan_conversion(Checkpoint(source), tmp_path / "out", Narrower(tmp_path))
    monkeypatch.setattr(plan.converter, "convert", lambda *_: iter([b"12"]))
    with pytest.raises(FileError, match=r"cannot read model\.safetensors"):
        writer.run_conversion(plan)
    assert not (tmp_path / "out" / "model.safetensors").exists()
