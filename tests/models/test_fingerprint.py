"""A fingerprint changes with any tensor, and with nothing else."""

import shutil

import pytest

from gaudi_calib.errors import ModelError
from gaudi_calib.models.fingerprint import fingerprint_model


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of two files, one tensor larger than all samples of it."""
    np = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"big": np.zeros(50_000, np.float32), "a": np.zeros(10, np.float32)}, directory / "model-1.safetensors")
    save_file({"b": np.zeros(10, np.float32)}, directory / "model-2.safetensors")
    return directory


def test_fingerprint_does_not_depend_on_the_place(checkpoint, tmp_path):
    """A copy is the same model, whatever else lies beside it."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert fingerprint_model(tmp_path / "copy") == fingerprint_model(checkpoint)


@pytest.mark.parametrize("tensor", ["big", "a", "b"])
@pytest.mark.parametrize("index", [0, -1])
def test_fingerprint_sees_a_change_of_any_tensor(tensor, index, checkpoint):
    """One changed value at the start or end of any tensor, in any file, changes it."""
    from safetensors.numpy import load_file, save_file

    before = fingerprint_model(checkpoint)
    path = checkpoint / ("model-2.safetensors" if tensor == "b" else "model-1.safetensors")
    tensors = load_file(path)
    tensors[tensor][index] = 1
    save_file(tensors, path)
    assert fingerprint_model(checkpoint) != before


def test_fingerprint_sees_config_and_names(checkpoint):
    """config.json and the name of a file both count."""
    seen = {fingerprint_model(checkpoint)}
    (checkpoint / "model-2.safetensors").rename(checkpoint / "model-3.safetensors")
    seen.add(fingerprint_model(checkpoint))
    (checkpoint / "config.json").write_text("{}")
    seen.add(fingerprint_model(checkpoint))
    assert len(seen) == 3


def test_fingerprint_of_other_formats_and_broken_files(tmp_path):
    """A file that is no safetensors is sampled as a whole; no config.json is an error."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        fingerprint_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    prints = []
    for content in (b"", b"short", b"\x05" + bytes(7) + b"[1,2]", bytes(100_000), bytes(99_999) + b"x"):
        (tmp_path / "model.safetensors").write_bytes(content)
        prints.append(fingerprint_model(tmp_path))
    assert len(set(prints)) == len(prints)
