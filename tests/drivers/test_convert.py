"""Weights in pickles become safetensors, or are refused; what is made is served as the model is meant."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from embedpool import cli
from embedpool.config.spec import LocalStConfig
from embedpool.drivers.body import tasks_of
from embedpool.drivers.convert import converted
from embedpool.drivers.layout import read_layout
from embedpool.errors import ModelFailed


@pytest.fixture
def pickled(made: Callable[[str], Path], tmp_path: Path) -> Callable[[int], Path]:
    """BGE-M3 as it lies on the hub: all of its weights are pickles, those of the model in so many files."""
    torch = pytest.importorskip("torch")
    import shutil

    def make(shards: int = 1) -> Path:
        folder = tmp_path / "bge-m3"
        shutil.copytree(made("bge-m3"), folder)
        whole = load_file(folder / "model.safetensors")
        names = sorted(whole)
        for number in range(shards):
            name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
            part = {n: torch.from_numpy(whole[n]) for n in names[number::shards]}
            torch.save(part, folder / name)
        for layer in ("sparse", "colbert"):
            file = folder / f"{layer}_linear.safetensors"
            torch.save({n: torch.from_numpy(a) for n, a in load_file(file).items()}, file.with_suffix(".pt"))
            file.unlink()
        (folder / "model.safetensors").unlink()
        return folder

    return make


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_in_pickles_is_served_with_all_its_outputs(
    pickled: Callable[[int], Path], made: Callable[[str], Path], tmp_path: Path, shards: int
) -> None:
    """Weight by weight what they were; before it is converted the error says how that is done."""
    folder = pickled(shards)
    with pytest.raises(ModelFailed, match="embedpool pull --convert"):
        read_layout(folder, LocalStConfig())
    to = tmp_path / "converted"
    names = converted(folder, to)
    assert {"sparse_linear.safetensors", "colbert_linear.safetensors"} < set(names)
    assert not [file for pattern in ("*.bin", "*.pt") for file in to.rglob(pattern)]
    found: dict[str, Any] = {}
    for file in to.glob("model*.safetensors"):
        found |= load_file(file)
    for name, array in load_file(made("bge-m3") / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], array)
    if shards > 1:
        index = json.loads((to / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(found)
    assert {"embed", "sparse", "multivector", "hybrid"} <= set(tasks_of(read_layout(to, LocalStConfig())))


class Runs:
    """A pickle that would write a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("content", ["runs", "broken", "no tensors"])
def test_a_pickle_that_holds_more_than_tensors_is_refused(
    pickled: Callable[[int], Path], tmp_path: Path, content: str
) -> None:
    """What is in it does not run."""
    torch = pytest.importorskip("torch")
    folder, mark = pickled(1), tmp_path / "ran"
    file = folder / "sparse_linear.pt"
    if content == "runs":
        file.write_bytes(pickle.dumps(Runs(mark)))
    elif content == "broken":
        file.write_bytes(b"nothing")
    else:
        torch.save([1, 2], file)
    with pytest.raises(ModelFailed, match=r"sparse_linear\.pt cannot be converted"):
        converted(folder, tmp_path / "converted")
    assert not mark.exists()


def test_the_command(
    pickled: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It converts a folder, opens what it made, and says how that is registered."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    command = ["pull", "BAAI/bge-m3", "--convert", "--set", f"path={pickled(1)}", "--set", "backend=torch"]
    assert cli.main(command) == 2
    assert "--convert needs --to" in capsys.readouterr().err
    assert cli.main([*command, "--to", "new"]) == 0
    said = capsys.readouterr()
    assert "converted model.safetensors" in said.err
    assert f"--set path={tmp_path / 'new'}" in said.out
