"""Whose numbers a model's vectors are."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedpool.drivers.space import of_files, of_probes

FILES = {
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "modules.json": b"[]",
    "sentencepiece.bpe.model": b"words",
    "2_Dense/pytorch_model.bin": b"these are loaded: there are no others",
    "code.py": b"",
}
PROBES = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    return tmp_path / "m"


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_decides_the_numbers_decides_the_space(folder: Path, name: str) -> None:
    """By its content, whatever its time says; a copy of the folder is the same."""
    before = of_files(folder, "embed")
    shutil.copytree(folder, folder.parent / "copy")
    assert of_files(folder.parent / "copy", "embed") == before
    stamp = os.stat(folder / name)
    (folder / name).write_bytes(FILES[name][:-1] + b"?")
    os.utime(folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert of_files(folder, "embed") != before
    (folder / name).unlink()
    assert of_files(folder, "embed") != before


def test_what_decides_no_number_changes_no_space(folder: Path) -> None:
    """A description, other formats of the weights, what a download leaves."""
    before = of_files(folder, "embed")
    for name in ("README.md", "pytorch_model.bin", "onnx/model.onnx", ".cache/huggingface/x.json", "openvino/a.xml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert of_files(folder, "embed") == before
    assert of_files(folder, "sparse") != before


@pytest.mark.parametrize("name", ["onnx/model.onnx", "model.onnx", "openvino/model.bin"])
def test_weights_of_another_format_count_where_there_are_no_others(folder: Path, name: str) -> None:
    """Two models that differ in nothing else are not the same."""
    (folder / "model.safetensors").unlink()
    spaces = set()
    for weights in (b"one", b"another"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(weights)
        spaces.add(of_files(folder, "embed"))
    assert len(spaces) == 2


def test_a_remote_model_is_recognised_in_spite_of_noise(tmp_path: Path) -> None:
    """Its vectors are compared with those seen before; others, or of another width, are another space."""
    space = of_probes(tmp_path, PROBES)
    noise = np.random.default_rng(2).normal(0, 0.005, PROBES.shape).astype(np.float32)
    assert of_probes(tmp_path, PROBES + noise) == space
    other = of_probes(tmp_path, PROBES[::-1].copy())
    assert other != space
    assert of_probes(tmp_path, PROBES[:, :8].copy()) not in (space, other)
    assert of_probes(tmp_path, PROBES) == space


def test_processes_agree_on_the_space_of_a_remote_model(tmp_path: Path) -> None:
    """Whichever worker sees it first."""
    with multiprocessing.get_context("spawn").Pool(4) as processes:
        spaces = processes.starmap(of_probes, [(tmp_path, PROBES)] * 8)
    assert len(set(spaces)) == 1


def test_a_broken_memory_of_spaces_breaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A torn file is passed over, and a disk that keeps nothing costs only the name."""
    space = of_probes(tmp_path, PROBES)
    (tmp_path / "spaces" / f"{space}.npy").write_bytes(b"\x93NUMPY torn")
    assert of_probes(tmp_path, PROBES) != space
    assert of_probes(Path(os.devnull, "state"), PROBES)
    assert "it cannot be kept" in caplog.text
