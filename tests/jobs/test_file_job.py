"""Files in, a file out: every input once, in order, however often the job is cut off and resumed."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow
import pytest
from hypothesis import strategies as st
from pyarrow import parquet

from embedpool import __version__
from embedpool.errors import InvalidRequest, ModelChanged
from embedpool.jobs import file_job
from embedpool.jobs.file_job import Computed, FileJob
from embedpool.jobs.sinks import ABOUT, SCORE, VECTOR, sink_of
from embedpool.jobs.sources import Files, Row
from embedpool.jobs.windows import answered
from embedpool.outputs import SparseRow
from tests.disks import fill, small_disk

FIXTURES = hypothesis.HealthCheck.function_scoped_fixture
WIDTH = 4
OUTS = ("out.jsonl", "out.npy", "out.parquet")


def vector(text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text)) % 1000), 1.0, 2.0]


@dataclasses.dataclass
class Model:
    """Computes windows; fails with the text `bad`, and as a whole after so many windows."""

    ends_after: float = float("inf")
    space: str = "s1"
    computed: list[str] = dataclasses.field(default_factory=list)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def __call__(self, rows: Sequence[Row]) -> Computed:
        with self.lock:
            if self.ends_after <= 0:
                raise RuntimeError("killed")
            self.ends_after -= 1
            self.computed += [row.parts[0] for row in rows]
        errors = {i: ("inference_failed", "no") for i, row in enumerate(rows) if row.parts[0] == "bad"}
        values = np.array([vector(row.parts[-1]) for row in rows], np.float32)
        return Computed(values, errors, self.space, tokens=len(rows))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_job, "WINDOW_ROWS", 3)


def texts_file(folder: Path, texts: Sequence[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": f"id-{i}"}) + "\n" for i, text in enumerate(texts)))
    return path


def job_of(folder: Path, out: str, column: str = VECTOR, **work: Any) -> FileJob:
    files = Files([str(folder / "in.jsonl")], ["text"], "id")
    return FileJob(files, sink_of(folder / out, column), {"model": "m", **work})


def found_in(path: Path) -> dict[str, list[float]]:
    """Vectors by id, of a file of any kind, in which no id comes twice."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        ids, vectors = [line["id"] for line in lines], [line["vector"] for line in lines]
    elif path.suffix == ".npy":
        ids = [json.loads(line) for line in path.with_name("out.ids.jsonl").read_text().splitlines()]
        vectors = np.load(path).tolist()
    else:
        table = parquet.read_table(path)
        ids, vectors = table["id"].to_pylist(), table["vector"].to_pylist()
    assert len(set(ids)) == len(ids) == len(vectors)
    return dict(zip(ids, vectors, strict=True))


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in.jsonl"}


@pytest.mark.parametrize("out", OUTS)
def test_every_input_gets_its_vector(tmp_path: Path, out: str) -> None:
    """In the order of the file; what failed stands beside, with its reason."""
    texts = [f"text {i}" for i in range(10)]
    texts[4] = "bad"
    texts_file(tmp_path, texts)
    done = job_of(tmp_path, out).run(Model())
    assert (done.rows, done.failed, done.tokens) == (10, 1, 10)
    expected = {f"id-{i}": vector(text) for i, text in enumerate(texts) if text != "bad"}
    assert found_in(tmp_path / out) == expected
    assert list(found_in(tmp_path / out)) == list(expected)
    (failure,) = (tmp_path / f"{out}.failed.jsonl").read_text().splitlines()
    assert json.loads(failure) == {"index": 4, "id": "id-4", "code": "inference_failed", "message": "no"}
    ids = {"out.ids.jsonl"} if out.endswith("npy") else set()
    assert left_over(tmp_path) == {out, f"{out}.failed.jsonl"} | ids


@hypothesis.given(
    out=st.sampled_from(OUTS), count=st.integers(0, 20), bad=st.sets(st.integers(0, 20), max_size=3),
    ends=st.lists(st.integers(0, 4), max_size=6), torn=st.binary(max_size=40),
)  # fmt: skip
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_job_that_is_cut_off_goes_on(
    tmp_path_factory: pytest.TempPathFactory, out: str, count: int, bad: set[int], ends: list[int], torn: bytes
) -> None:
    """Whatever was written beyond the last window that was kept; no text that is done is computed again."""
    folder = tmp_path_factory.mktemp("job")
    texts = ["bad" if i in bad else f"text {i}" for i in range(count)]
    texts_file(folder, texts)
    again: list[str] = []
    for end in ends:
        job = job_of(folder, out)
        model = Model(ends_after=end)
        try:
            job.run(model)
        except RuntimeError:
            tear(folder, out, torn)
        else:
            break
        finally:
            again += model.computed
    if not (folder / out).exists():
        model = Model()
        done = job_of(folder, out).run(model)
        again += model.computed
        assert done.rows == count
    expected = {f"id-{i}": vector(text) for i, text in enumerate(texts) if text != "bad"}
    assert found_in(folder / out) == expected
    failures = folder / f"{out}.failed.jsonl"
    failed = [json.loads(line)["index"] for line in failures.read_text().splitlines()] if failures.exists() else []
    assert failed == sorted(i for i, text in enumerate(texts) if text == "bad")
    assert len(again) <= count + 2 * 3 * len(ends)  # two windows a time were under way at most
    assert not any(name.endswith((".job", ".part", ".parts", ".new")) for name in left_over(folder))


def test_how_far_a_parquet_file_is_tells_how_long_its_texts_are(tmp_path: Path) -> None:
    """Not how many rows: the time that is left follows from it."""
    texts = [*(f"short {i}" for i in range(100)), *(f"{i} " + "long " * 99 for i in range(100))]
    table = pyarrow.table({"text": texts, "other": ["x" * 5000] * 100 + [""] * 100})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=50, use_dictionary=False)
    ends = [row.end for row in Files([str(tmp_path / "in.parquet")], ["text"], None).rows()]
    size = (tmp_path / "in.parquet").stat().st_size
    assert (len(ends), ends, ends[-1]) == (200, sorted(ends), size)
    assert ends[99] < size / 20


@pytest.mark.parametrize("out", OUTS)
def test_an_id_that_no_file_of_results_holds_fails_alone(tmp_path: Path, out: str) -> None:
    """A number of more than 64 bits, say; the largest of 64 is one."""
    given = [2**63 - 1, -(2**63), 2**63, 10**30, True, 7]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "a", "id": one}) + "\n" for one in given))
    done = job_of(tmp_path, out).run(Model())
    assert (done.rows, done.failed) == (6, 3)
    failed = [json.loads(one) for one in (tmp_path / f"{out}.failed.jsonl").read_text().splitlines()]
    assert [(one["index"], one["code"]) for one in failed] == [
        (2, "invalid_row"),
        (3, "invalid_row"),
        (4, "invalid_row"),
    ]
    assert list(found_in(tmp_path / out)) == [2**63 - 1, -(2**63), 7]


def test_two_processes_are_not_at_the_same_job(tmp_path: Path) -> None:
    """They would write each other's results away; the second is told so, and the first goes on."""
    texts_file(tmp_path, [f"text {i}" for i in range(9)])
    model = Model()

    def compute(rows: Sequence[Row]) -> Computed:
        if rows[0].index == 3:
            with pytest.raises(InvalidRequest, match="another process"):
                job_of(tmp_path, "out.npy").run(Model())
        return model(rows)

    assert job_of(tmp_path, "out.npy").run(compute).rows == 9
    assert len(found_in(tmp_path / "out.npy")) == 9
    assert left_over(tmp_path) == {"out.npy", "out.ids.jsonl"}


@pytest.mark.parametrize("out", OUTS)
def test_a_full_disk_ends_a_job_that_can_go_on(tmp_path: Path, out: str) -> None:
    """In the middle of it: what is half written is cut off, and when there is room nothing is computed again."""
    texts = [f"text {i}" for i in range(12)]
    with small_disk(tmp_path / "disk") as disk:
        texts_file(disk, texts)
        models = Model(), Model()

        def compute(rows: Sequence[Row]) -> Computed:
            if rows[0].index == 6:
                fill(disk / "waste")
            return models[0](rows)

        with pytest.raises(OSError, match="No space left"):
            job_of(disk, out).run(compute)
        assert not list(disk.glob("*.new"))
        kept = json.loads((disk / f"{out}.job").read_text())
        if "bytes" in kept["sink"]:
            assert (disk / f"{out}.part").stat().st_size == kept["sink"]["bytes"]
        (disk / "waste").unlink()
        assert job_of(disk, out).run(models[1]).rows == 12
        assert found_in(disk / out) == {f"id-{i}": vector(text) for i, text in enumerate(texts)}
        assert not {"text 0", "text 1", "text 2"} & set(models[1].computed)


def tear(folder: Path, out: str, torn: bytes) -> None:
    """As a kill in the middle of a write leaves files."""
    for name in (f"{out}.part", f"{out}.failed.jsonl", "out.ids.jsonl.part"):
        if (folder / name).exists():
            with (folder / name).open("ab") as file:
                file.write(torn)
    if (folder / f"{out}.parts").exists():
        (folder / f"{out}.parts" / "00000099.parquet").write_bytes(torn)
        (folder / f"{out}.parts" / "00000001.new").write_bytes(torn)


@pytest.mark.parametrize("out", OUTS)
def test_the_last_step_may_be_cut_off_too(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its name, and the job has not been told: then nothing is left to do."""
    texts_file(tmp_path, ["a", "b", "c", "d"])
    job = job_of(tmp_path, out)
    with monkeypatch.context() as patch:
        patch.setattr(FileJob, "_end", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            job.run(Model())
    model = Model()
    job_of(tmp_path, out).run(model)
    assert model.computed == []
    assert len(found_in(tmp_path / out)) == 4
    assert left_over(tmp_path) == {out} | ({"out.ids.jsonl"} if out.endswith("npy") else set())


@pytest.mark.parametrize("change", [{"model": "other"}, {"options": {"dimensions": 2}}, {"columns": ["b"]}])
def test_another_job_is_not_resumed(tmp_path: Path, change: dict[str, Any]) -> None:
    """Of another model, with other options, or of files that have changed; nothing is lost."""
    written_ns = texts_file(tmp_path, [f"text {i}" for i in range(10)]).stat().st_mtime_ns
    with pytest.raises(RuntimeError):
        job_of(tmp_path, "out.jsonl").run(Model(ends_after=1))
    with pytest.raises(InvalidRequest, match=next(iter(change))):
        job_of(tmp_path, "out.jsonl", **change).run(Model())
    texts_file(tmp_path, [f"tixt {i}" for i in range(10)])
    os.utime(tmp_path / "in.jsonl", ns=(written_ns + 1, written_ns + 1))
    with pytest.raises(InvalidRequest, match="files"):
        job_of(tmp_path, "out.jsonl").run(Model())
    texts_file(tmp_path, [f"text {i}" for i in range(10)])
    os.utime(tmp_path / "in.jsonl", ns=(written_ns, written_ns))  # as it was
    job_of(tmp_path, "out.jsonl").run(Model())
    assert len(found_in(tmp_path / "out.jsonl")) == 10


def test_vectors_of_two_spaces_are_not_joined(tmp_path: Path) -> None:
    """Neither within a run nor when it is resumed."""
    texts_file(tmp_path, [f"text {i}" for i in range(10)])
    with pytest.raises(RuntimeError):
        job_of(tmp_path, "out.jsonl").run(Model(ends_after=1))
    with pytest.raises(ModelChanged, match="s1, and is s2"):
        job_of(tmp_path, "out.jsonl").run(Model(space="s2"))
    job_of(tmp_path, "out.jsonl").run(Model())
    assert len(found_in(tmp_path / "out.jsonl")) == 10


def test_what_made_a_parquet_file_stands_in_it(tmp_path: Path) -> None:
    """Model, options, space; vectors are lists of a fixed size, in few row groups."""
    texts_file(tmp_path, [f"text {i}" for i in range(10)])
    job_of(tmp_path, "out.parquet", options={"dimensions": 4}).run(Model())
    with parquet.ParquetFile(tmp_path / "out.parquet") as file:
        assert file.schema_arrow.field("vector").type == pyarrow.list_(pyarrow.float32(), WIDTH)
        about = json.loads(file.schema_arrow.metadata[ABOUT])
        assert file.metadata.num_row_groups == 1
    assert about == {"model": "m", "space": "s1", "options": {"dimensions": 4}, "version": __version__}  # no paths


def test_scores(tmp_path: Path) -> None:
    """A number a pair."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"query": "q", "document": "d" * i}) + "\n" for i in range(5)))
    for out in ("s.jsonl", "s.parquet"):
        files = Files([str(path)], ["query", "document"], None)
        FileJob(files, sink_of(tmp_path / out, SCORE), {}).run(
            lambda rows: Computed(np.array([[len(row.parts[1])] for row in rows], np.float32), {}, "s")
        )
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert lines == [{"id": i, "score": float(i)} for i in range(5)]
    assert parquet.read_table(tmp_path / "s.parquet").to_pylist() == lines


# --- what is read


def write_txt(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(text + "\n" for text in texts))


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")


def write_csv(path: Path, texts: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([["n", "text"], *([i, text] for i, text in enumerate(texts))])


def write_parquet(path: Path, texts: Sequence[str]) -> None:
    parquet.write_table(pyarrow.table({"text": list(texts)}), path, row_group_size=4)


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    ".txt": write_txt, ".jsonl": write_jsonl, ".csv": write_csv, ".tsv": write_csv, ".parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_format_is_read(tmp_path: Path, suffix: str) -> None:
    """All texts of it, in their order, from any row on; the bytes end with the file."""
    texts = ["one", "zwei, drei", "", 'said "so"', "日本語 🙂", *([] if suffix == ".txt" else ["two\nlines"])]
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, texts)
    files = Files([str(path)], ["text"], None)
    rows = list(files.rows())
    assert [row.parts for row in rows] == [(text,) for text in texts]
    assert [row.id for row in rows] == list(range(len(texts)))
    assert [row.parts for row in files.rows(2)] == [(text,) for text in texts[2:]]
    assert files.total_bytes - 1 <= rows[-1].end <= files.total_bytes


def test_several_files_are_one(tmp_path: Path) -> None:
    """Those of a folder in the order of their names, or of a glob; rows are numbered through."""
    for i, suffix in enumerate(WRITERS):
        WRITERS[suffix](tmp_path / f"{i}{suffix}", [f"{suffix} a", f"{suffix} b"])
    (tmp_path / "notes.md").write_text("not this one")
    rows = list(Files([str(tmp_path)], ["text"], None).rows())
    assert [row.parts[0] for row in rows] == [f"{suffix} {letter}" for suffix in WRITERS for letter in "ab"]
    assert [row.index for row in rows] == list(range(10))
    assert len(list(Files([str(tmp_path / "*.jsonl"), str(tmp_path / "0.txt")], ["text"], None).rows())) == 4


def test_a_row_without_a_text_fails_alone(tmp_path: Path) -> None:
    """It has its place and a reason."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": 7}\nnot json\n[1]\n{"other": "x"}\n"a string"\n\xff\n{"text": "last"}\n'
    )
    rows = list(Files([str(path)], ["text"], None).rows())
    assert [bool(row.error) for row in rows] == [False, True, True, True, True, False, True, False]
    assert rows[5].parts == ("a string",)
    texts = tmp_path / "b.txt"
    texts.write_bytes(b"good\n\xff\xfe\n")
    assert [bool(row.error) for row in Files([str(texts)], ["text"], None).rows()] == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"n,body\n1,x\n", "no column text; it has n, body"),
        ("a.parquet", b"not parquet", "a.parquet"),
        ("a.docx", b"", "must end with"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """With its name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        list(Files([str(tmp_path / name)], ["text"], None).rows())
    with pytest.raises(InvalidRequest, match="no file is"):
        Files([str(tmp_path / "nothing*")], ["text"], None)
    with pytest.raises(InvalidRequest, match="must end with"):
        sink_of(tmp_path / "out.txt", VECTOR)


# --- the engine


@hypothesis.given(st.integers(0, 12), st.booleans())
def test_windows_are_answered_once(count: int, in_order: bool) -> None:
    """In their order, or as they are done; no more than two are on their way."""
    under_way, most, lock = [0], [0], threading.Lock()

    def compute(number: int) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        with lock:
            under_way[0] -= 1
        return number

    found = list(answered(range(count), compute, threading.Event(), in_order=in_order))
    assert (found if in_order else sorted(found)) == list(range(count))
    assert most[0] <= 2


def test_a_window_that_fails_ends_it() -> None:
    """The first goes alone; `over` tells those that are under way, and no further one is read."""
    over, read = threading.Event(), []

    def windows() -> Any:
        for number in range(100):
            read.append(number)
            yield number

    def compute(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(answered(windows(), compute, over))
    assert over.is_set()
    assert max(read) <= 5
    read.clear()
    answers = answered(windows(), lambda number: number, threading.Event())
    assert next(answers) == 0
    assert read == [0]
    answers.close()


def sparse_row(text: str) -> SparseRow:
    return SparseRow(np.arange(len(text), dtype=np.int32), np.full(len(text), 0.5, np.float32))


def several_vectors(text: str) -> Any:
    return np.full((len(text), 2 if text else 0), len(text), np.float32)


OF_A_TEXT: dict[str, Callable[[str], Any]] = {
    "sparse": sparse_row,
    "multivector": several_vectors,
    "several": lambda text: {"dense": np.float32(vector(text)), "sparse": sparse_row(text)},
}


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("kind", OF_A_TEXT)
def test_rows_that_are_no_vectors(tmp_path: Path, kind: str, out: str) -> None:
    """Each under its id, also when the job is cut off and resumed; a text that fails has none."""
    texts = ["a", "bb", "", "bad", "ccc", "dddd", "e"]
    texts_file(tmp_path, texts)
    make = OF_A_TEXT[kind]

    def compute(rows: Sequence[Row]) -> Computed:
        errors = {i: ("inference_failed", "no") for i, row in enumerate(rows) if row.parts[0] == "bad"}
        return Computed([None if i in errors else make(row.parts[0]) for i, row in enumerate(rows)], errors, "s1")

    ends_after = [1]

    def cut_off(rows: Sequence[Row]) -> Computed:
        if not ends_after.pop():
            raise RuntimeError("killed")
        ends_after.append(0)
        return compute(rows)

    with pytest.raises(RuntimeError):
        job_of(tmp_path, out).run(cut_off)
    job_of(tmp_path, out).run(compute)
    good = {f"id-{i}": make(text) for i, text in enumerate(texts) if text != "bad"}
    if out.endswith("jsonl"):
        lines = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
        found = {line.pop("id"): line for line in lines}
        column = "outputs" if kind == "several" else "vector"
        wanted: dict[str, Any] = {id_: {column: as_json(row)} for id_, row in good.items()}
    else:
        rows = parquet.read_table(tmp_path / out).to_pylist()
        found = {row.pop("id"): row for row in rows}
        wanted = {id_: as_columns(row) for id_, row in good.items()}
    assert found == wanted


def as_json(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: as_json(part) for name, part in row.items()}
    return (
        {"indices": row.indices.tolist(), "values": row.values.tolist()} if isinstance(row, SparseRow) else row.tolist()
    )


def as_columns(row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        found = as_json(row)
        return {"dense": found["dense"], **{f"sparse_{name}": part for name, part in found["sparse"].items()}}
    return as_json(row) if isinstance(row, SparseRow) else {"vector": row.tolist()}
