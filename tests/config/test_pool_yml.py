from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedpool.config import edit
from embedpool.config.pool_yml import EMPTY_POOL_YML, PoolFile, as_document, edited, parse
from embedpool.config.spec import ModelSpec, PoolSpec
from embedpool.errors import EmbedpoolError, InvalidRequest, ModelNotFound, PoolFileInvalid, StorageError
from tests.conftest import fake_pool_yml, fake_spec

CONTRACT = """\
version: 1
models:
  - model: sentence-transformers/all-MiniLM-L6-v2     # Hugging Face id
    alias: minilm-l6                                  # optional, unique among names and aliases
    enabled: true
    driver:
      type: local_st                                  # local_st | http | fake
      config: {max_seq_length: 384, normalize: true, dtype: float32}
    scaling: {min: 1, max: 1, idle_ttl_s: 30}         # replicas; min 0 = load on first use, unload when idle
    queue: {max_size: 1000}                           # in texts; max_inflight_per_replica is auto
  - model: my-remote-embedding-model
    driver:
      type: http
      config: {base_url: "http://localhost:5000/embed", remote_model: model-id-on-remote, timeout_s: 60}
"""

BLOCK = """\
# top
version: 1
models:
  # about a
  - model: a
    # inside a
    alias: x
    driver:
      type: fake
      # deep inside a
      config:
        dim: 8
    enabled: false
  # about b
  - model: b
    driver: {type: fake}
# end
"""

ZERO_INDENT = """\
# top
version: 1
models:
# about a
- model: a
  # inside a
  alias: x
  driver:
    type: fake
    config:
      # deep inside a
      dim: 8
  enabled: false
# about b
- driver: {type: fake}
  model: b
# end
"""

FLOW_ENTRIES = """\
# top
models:
  # about a
  - {model: a, alias: x, driver: {type: fake, config: {dim: 8}}, enabled: false}
  # about b
  - {model: b, driver: {type: fake}}
# end
"""

DASH_ALONE = BLOCK.replace("- model: a", "-\n    model: a").replace("- model: b", "-\n    model: b")

FLOW_LIST = """\
# top
models: [
  # about a
  {model: a, alias: x, driver: {type: fake, config: {dim: 8}}, enabled: false},
  # about b
  {model: b, driver: {type: fake}},
]
# end
"""

SEPARATED = "%YAML 1.2\n# top\n---\n# about the list\n" + BLOCK.split("\n", 1)[1]

STYLES = {
    "block": BLOCK,
    "zero indent": ZERO_INDENT,
    "flow entries": FLOW_ENTRIES,
    "dash alone": DASH_ALONE,
    "flow list": FLOW_LIST,
    "document marker": SEPARATED,
    "quoted keys": BLOCK.replace("models:", '"models" :'),
    "anchor": BLOCK.replace("type: fake\n", "type: &kind fake\n").replace("{type: fake}", "{type: *kind}"),
}


def model(name: str, **more: Any) -> ModelSpec:
    return edit.parse_registration({"model": name, "driver_type": "fake", **more})


def written(text: str, old: PoolSpec, new: PoolSpec) -> PoolSpec | str:
    """What the changed text says, or that it has to be changed by hand."""
    try:
        return parse(edited(text, old, new))
    except PoolFileInvalid as error:
        return "by hand" if "by hand" in error.message else error.message


def comments(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]


def refusal(text: str) -> str:
    with pytest.raises(PoolFileInvalid) as caught:
        parse(text)
    return caught.value.message


# --- reading


def test_the_contract_s_example_is_read() -> None:
    """The documented file means what its comments say."""
    local, remote = parse(CONTRACT).models
    assert (local.model, local.alias, local.enabled) == ("sentence-transformers/all-MiniLM-L6-v2", "minilm-l6", True)
    assert (local.driver.config.max_seq_length, local.scaling.idle_ttl_s, local.queue.max_size) == (384, 30, 1000)
    assert (remote.driver.type, remote.driver.config.timeout_s, remote.enabled) == ("http", 60, True)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_writing_means_the_same(style: str) -> None:
    """Block or flow, indented or not: it is the same pool."""
    assert parse(STYLES[style]).models == (
        model("a", alias="x", enabled=False, driver_config={"dim": 8}),
        model("b"),
    )


def test_a_new_pool_is_empty_on_purpose() -> None:
    """What `init` writes is a pool without models."""
    assert parse(EMPTY_POOL_YML) == parse("models: []") == PoolSpec()


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing yet\n", "---\n", "null\n", "{}\n", "version: 1\n", "models:\n", "models: null\n"]
)
def test_an_empty_file_is_a_fault_and_never_an_empty_pool(text: str) -> None:
    """Editors truncate before they write: a moment of emptiness must not unload every model."""
    assert refusal(text).startswith("pool.yml")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("version: 1\nmodels: []\nmodells: []\n", 3, "modells: unknown key 'modells'; did you mean models?"),
        ("version: 2\nmodels: []\n", 1, "version"),
        (
            "models:\n  - model: a\n    drivr: {type: fake}\n",
            3,
            "models[0].drivr: unknown key 'drivr'; did you mean driver?",
        ),
        ("models:\n  - model: a\n", 2, "models[0].driver: Missing"),
        ("models:\n  - model: a\n    driver: {type: fak}\n", 3, "must be one of local_st, http, fake"),
        (
            "models:\n  - model: a\n    driver:\n      type: fake\n      config:\n        dimm: 3\n",
            6,
            "did you mean dim?",
        ),
        ("models:\n  - model: a\n    enabled: yes\n    driver: {type: fake}\n", 3, "must be true or false, not 'yes'"),
        ("models:\n  - model: a\n    enabled: 'true'\n    driver: {type: fake}\n", 3, "must be true or false"),
        ("models:\n  - model: 12\n    driver: {type: fake}\n", 2, "models[0].model"),
        ("models:\n  - model: a b\n    driver: {type: fake}\n", 2, "models[0].model"),
        ("models:\n  - {model: a, driver: {type: fake}}\n  - 5\n", 3, "models[1]"),
        ("models:\n  - {model: a, driver: {type: fake}}\n  -\n", 3, "models[1]"),
        ("models: {a: 1}\n", 1, "models"),
        ("- models\n", 1, "the document"),
        ("models:\n  - {model: a, driver: {type: fake}, queue: {max_size: '12'}}\n", 2, "queue.max_size"),
        ("models:\n  - {model: a, driver: {type: fake}, scaling: {max: 12.7}}\n", 2, "scaling.max"),
        ("models:\n  - {model: a, driver: {type: fake}, scaling: {idle_ttl_s: .inf}}\n", 2, "scaling.idle_ttl_s"),
        ("models:\n  - {model: a, driver: {type: fake}, scaling: {idle_ttl_s: 1" + "0" * 400 + "}}\n", 2, "idle_ttl_s"),
        ("models: []\nversion: 1\nmodels: []\n", 3, 'the key "models" stands here twice'),
        ("models:\n  - {model: 123, driver: {type: fake}}\n", 2, "not 123: put it in quotation marks"),
        ("models:\n  - {model: m, alias: 2026-01-01, driver: {type: fake}}\n", 2, "put it in quotation marks"),
        ("models:\n  - {model: [m], driver: {type: fake}}\n", 2, "must be a text, not a list"),
        ("models:\n  - {model: a\n", 3, ""),
        ("models:\n\t- model: a\n", 2, ""),
    ],
)
def test_a_fault_is_named_with_file_line_and_key(text: str, line: int, says: str) -> None:
    """A mistake is found without searching, and an unknown key names the nearest known one."""
    message = refusal(text)
    assert message.startswith(f"pool.yml, line {line}: ")
    assert says in message


@pytest.mark.parametrize("value", ["2024-13-45", "1" * 5000, "!!int x", "!!float x", "!!bool x", "!!timestamp x"])
def test_a_value_yaml_itself_cannot_read_is_a_fault_of_the_file(value: str) -> None:
    """A date of month 13 or a number of 5000 digits is reported like any other fault."""
    assert refusal(f"models:\n  - {{model: a, alias: {value}, driver: {{type: fake}}}}\n").startswith("pool.yml")


@pytest.mark.filterwarnings("ignore::ruamel.yaml.error.ReusedAnchorWarning")
@settings(deadline=None)
@given(st.text("models: {driver1}[]\n-&*!'\"#|>?%.~,0x\t<", max_size=40).map(lambda tail: "models: " + tail))
def test_no_text_does_worse_than_be_refused(text: str) -> None:
    """Whatever stands in pool.yml, the outcome is a pool or one error with a sentence."""
    with contextlib.suppress(PoolFileInvalid):
        assert isinstance(parse(text), PoolSpec)


@pytest.mark.parametrize(
    "models",
    [
        ("model: a", "model: a"),
        ("model: a, alias: x", "model: x"),
        ("model: a", "model: b, alias: a"),
        ("model: a, alias: x", "model: b, alias: x"),
    ],
)
def test_a_name_used_twice_is_a_fault(models: tuple[str, ...]) -> None:
    """Names and aliases are unique together; the fault stands at the second and points to the first."""
    message = refusal(fake_pool_yml(*models))
    assert "pool.yml, line 4: models[1]." in message
    assert "already used by models[0]" in message


def test_an_alias_that_is_the_own_name_means_none() -> None:
    """It is accepted, and is the same spec as without it, so that registering that again is a success."""
    pool = fake_spec("model: a, alias: a")
    assert pool.names == ["a"]
    assert edit.register(pool, model("a")) == pool


@pytest.mark.parametrize("key", ["alias", "enabled", "scaling", "queue", "scaling: {min: null, max", "driver: {config"])
def test_null_in_the_file_means_absent(key: str) -> None:
    """A key written without a value has its default."""
    inside = f"{key}: null" + "}" * key.count("{")
    if key.startswith("driver"):
        inside = "driver: {type: fake, config: null}"
    assert fake_spec(f"model: a, {inside}").models == (model("a"),)


# --- changing the text

CHANGES = {
    "register": lambda p: edit.register(p, model("z", alias="zz", min=0, driver_config={"dim": 4})),
    "replace": lambda p: edit.register(
        p, model("a", idle_ttl_s=1.5, driver_config={"prompts": {"q": "query: "}}), replace=True
    ),
    "replace by another driver": lambda p: edit.register(
        p,
        edit.parse_registration({"model": "a", "driver_type": "http", "driver_config": {"base_url": "http://h/e"}}),
        replace=True,
    ),
    "set an alias": lambda p: edit.set_alias(p, "b", "y"),
    "change an alias": lambda p: edit.set_alias(p, "a", "y"),
    "clear an alias": lambda p: edit.set_alias(p, "a", None),
    "enable": lambda p: edit.set_enabled(p, "a", True),
    "disable": lambda p: edit.set_enabled(p, "b", False),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("change", CHANGES)
def test_comments_survive_a_change(style: str, change: str) -> None:
    """Whatever is changed from the command line, no comment of whoever wrote the file is lost or doubled."""
    text = STYLES[style]
    old = parse(text)
    new = CHANGES[change](old)
    if style == "anchor" and change == "replace by another driver":
        assert written(text, old, new) in (new, "by hand")
        return
    after = edited(text, old, new)
    assert parse(after) == new
    assert sorted(comments(after)) == sorted(comments(text))


@pytest.mark.parametrize("style", ["block", "zero indent", "flow entries", "dash alone"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_comment_stays_above_what_it_is_about(style: str, change: str) -> None:
    """The line before the next entry's comment is never a line of another entry that moved behind it."""
    text = STYLES[style]
    old = parse(text)
    after = edited(text, old, CHANGES[change](old)).splitlines()
    below = "\n".join(after[[line.strip() for line in after].index("# about b") :])
    above = "\n".join(after[: [line.strip() for line in after].index("# about b")])
    assert "model: b" in below
    assert "model: a" in above
    assert "model: a" not in below
    assert below.splitlines()[1].lstrip().startswith("-")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_removing_a_model_leaves_the_comments_around_it(style: str, name: str) -> None:
    """Only the lines of the entry itself go; or, where other entries need them, nothing is changed at all."""
    text = STYLES[style]
    old = parse(text)
    new = edit.unregister(old, name)
    if style == "anchor" and name == "a":
        assert written(text, old, new) in (new, "by hand")
        return
    after = edited(text, old, new)
    assert parse(after) == new
    inside = {"a": {"# inside a", "# deep inside a"}, "b": set()}[name]
    assert [c for c in comments(after) if c not in inside] == [c for c in comments(text) if c not in inside]


@pytest.mark.parametrize("style", STYLES)
def test_a_pool_can_be_emptied_and_filled_again(style: str) -> None:
    """The last model may go, and the file still says so in a way that it can be read and added to."""
    text = STYLES[style]
    pool = parse(text)
    for change in (
        lambda p: edit.unregister(p, "b"),
        lambda p: edit.unregister(p, "a"),
        lambda p: edit.register(p, model("z")),
        lambda p: edit.register(p, model("y")),
    ):
        new = change(pool)
        text, pool = edited(text, pool, new), new
        assert parse(text) == pool
    assert {"# top", "# about a", "# about b"} <= set(comments(text))


def test_a_new_key_does_not_come_between_a_model_and_the_comment_of_the_next() -> None:
    """Also beside a single one: else the comment would go with the model that stands before it."""
    text = """\
version: 1
models:
- model: a
  driver: {type: fake}
  scaling:
    min: 0
# about b
- model: b
  driver: {type: fake}
"""
    old = parse(text)
    new = edit.register(old, model("a", min=0, idle_ttl_s=0.5), replace=True)
    text = edited(text, old, new)
    assert parse(text) == new
    assert "# about b\n- model: b" in edited(text, new, edit.unregister(new, "a"))


def test_key_order_quotes_and_inline_comments_survive() -> None:
    """The contract's own file with its remarks: only the line that is meant changes."""
    old = parse(CONTRACT)
    after = edited(CONTRACT, old, edit.set_alias(old, "minilm-l6", "mini"))
    before_lines, after_lines = CONTRACT.splitlines(), after.splitlines()
    changed = [i for i, (b, a) in enumerate(zip(before_lines, after_lines, strict=True)) if b.split() != a.split()]
    assert [after_lines[i].split()[:2] for i in changed] == [["alias:", "mini"]]
    assert "# optional, unique among names and aliases" in after


def test_a_shared_anchor_is_not_changed_for_others() -> None:
    """A change that would change another model too is refused, and says to edit by hand, or is written out."""
    text = fake_pool_yml("model: a, scaling: &s {max: 2}", "model: b, scaling: *s")
    old = parse(text)
    new = edit.register(old, model("b", max=3), replace=True)
    assert written(text, old, new) in (new, "by hand")


NAMES = ["a", "b", "org/c", "off", "12:30", "1e5", "0x10", "null", "2024-01-01", "a:"]
names = st.sampled_from(NAMES)
flat = st.fixed_dictionaries(
    {"alias": st.none() | names, "enabled": st.booleans()},
    optional={
        "min": st.integers(0, 1),
        "max": st.integers(1, 3),
        "idle_ttl_s": st.sampled_from([30, 0.5, 1e-7, 1e22]),
        "queue_max_size": st.integers(1, 9),
        "driver_config": st.fixed_dictionaries(
            {},
            optional={
                "dim": st.integers(1, 9),
                "dtype": st.just("float16"),
                "prompts": st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=2),
            },
        ),
    },
)
steps = st.one_of(
    st.tuples(st.just("register"), names, flat),
    st.tuples(st.just("alias"), names, st.none() | names),
    st.tuples(st.just("enable"), names, st.booleans()),
    st.tuples(st.just("unregister"), names, st.none()),
)


def take(pool: PoolSpec, step: tuple[str, str, Any]) -> PoolSpec:
    kind, name, value = step
    if kind == "register":
        return edit.register(pool, model(name, **value), replace=True)
    if kind == "alias":
        return edit.set_alias(pool, name, value)
    if kind == "enable":
        return edit.set_enabled(pool, name, value)
    return edit.unregister(pool, name)


@st.composite
def handwritten(draw: st.DrawFn) -> tuple[str, dict[str, set[str]]]:
    """A pool.yml as people write it, and the comments inside each entry."""
    inside: dict[str, set[str]] = {}
    number = iter(range(1000))
    indent = draw(st.sampled_from(["", "  ", "    "]))
    lines = ["# top", "version: 1", "# before", "models:"]
    chosen = draw(st.lists(st.sampled_from(["a", "b", "org/c"]), unique=True, max_size=3))
    if not chosen:
        lines[-1] += " []  # none yet"
    for name in chosen:
        if draw(st.booleans()):
            lines.append(f"{indent}# outside {next(number)}")
        inside[name] = set()
        if draw(st.booleans()):
            lines.append(
                f"{indent}- {{model: {name}, driver: {{type: fake, config: {{dim: 3}}}}, scaling: {{max: 2}}}}"
            )
            continue
        body = ["driver:", "  type: fake", "  config:", "    dim: 3", "    prompts: {q: 'query: '}"]
        for extra in (
            ["enabled: false"],
            ["scaling:", "  min: 0", "  max: 2"],
            [f"alias: '{name}-alias'"],
            ["queue: {max_size: 4}"],
        ):
            if draw(st.booleans()):
                body = body + extra if draw(st.booleans()) else extra + body
        lines.append(f"{indent}- model: {name}")
        for line in body:
            if draw(st.integers(0, 3)) == 0:
                inside[name].add(comment := f"# inside {next(number)}")
                lines.append(f"{indent}  {line[: len(line) - len(line.lstrip())]}{comment}")
            lines.append(f"{indent}  {line}")
    if draw(st.booleans()):
        lines.append("# end")
    return "\n".join(lines) + "\n", inside


@settings(deadline=None, max_examples=100)
@given(handwritten(), st.lists(steps, min_size=1, max_size=6))
def test_any_sequence_of_changes_keeps_text_and_pool_together(
    written: tuple[str, dict[str, set[str]]], sequence: list[tuple[str, str, Any]]
) -> None:
    """The text always says what the pool is, and no comment outside deleted models is lost."""
    text, inside = written
    pool = parse(text)
    expected = set(comments(text))
    for step in sequence:
        try:
            new = take(pool, step)
        except EmbedpoolError:
            continue
        for gone in {m.model for m in pool.models} - {m.model for m in new.models}:
            expected -= inside.pop(gone, set())
        text, pool = edited(text, pool, new), new
        assert parse(text) == pool
        assert expected <= set(comments(text))


# --- changing the file


@pytest.fixture
def pool_file(tmp_path: Path) -> PoolFile:
    (tmp_path / "pool.yml").write_text(BLOCK)
    return PoolFile(tmp_path / "pool.yml")


def test_an_edit_is_written_and_given_back(pool_file: PoolFile) -> None:
    """What `edit` gives is what the file says from then on, and nothing but the lock stays beside it."""
    new = pool_file.edit(lambda p: edit.register(p, model("z")))
    assert new == pool_file.read()
    assert new.names == ["a", "x", "b", "z"]
    assert {p.name for p in pool_file.path.parent.iterdir()} <= {"pool.yml", "pool.yml.lock"}


def test_no_change_writes_nothing(pool_file: PoolFile) -> None:
    """A change that changes nothing leaves the very file in place."""
    before = pool_file.path.stat()
    pool_file.edit(lambda p: edit.set_enabled(p, "a", False))
    after = pool_file.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_refused_change_leaves_the_file_alone(pool_file: PoolFile) -> None:
    """The error of the change comes through, and the lock is free again."""
    with pytest.raises(ModelNotFound):
        pool_file.edit(lambda p: edit.unregister(p, "nope"))
    assert pool_file.content() == BLOCK
    assert pool_file.edit(lambda p: edit.unregister(p, "b")).names == ["a", "x"]


def test_a_link_stays_a_link_and_the_mode_is_kept(tmp_path: Path) -> None:
    """An edit goes to where the link points, and who may read the file does not change."""
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "models.yml", tmp_path / "pool.yml"
    real.write_text(BLOCK)
    real.chmod(0o640)
    link.symlink_to("real/models.yml")
    PoolFile(link).edit(lambda p: edit.unregister(p, "b"))
    assert link.is_symlink()
    assert os.readlink(link) == "real/models.yml"
    assert parse(real.read_text()).names == ["a", "x"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("real", "pool.yml")] == []


@pytest.mark.parametrize("content", [b"", b"models:\n", b"models: [\n", b"models:\n  - model: a\n", b"\xff\xfe"])
def test_a_broken_file_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    """An edit of a file that cannot be understood is refused, and its bytes stay."""
    path = tmp_path / "pool.yml"
    path.write_bytes(content)
    with pytest.raises(PoolFileInvalid, match=r"pool\.yml"):
        PoolFile(path).edit(lambda p: edit.register(p, model("z")))
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_is_not_there_is_not_an_empty_pool(tmp_path: Path, kind: str) -> None:
    """Neither reading nor editing makes one up."""
    path = tmp_path / "pool.yml"
    if kind == "folder":
        path.mkdir()
    for action in (PoolFile(path).read, lambda: PoolFile(path).edit(lambda p: p)):
        with pytest.raises(PoolFileInvalid, match=r"pool\.yml"):
            action()
    assert not path.is_file()


@pytest.mark.parametrize("where", ["open", "fsync", "chmod", "replace", "lock"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_changes_nothing(
    pool_file: PoolFile, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    """The error is one of storage, the bytes are the old ones, no temporary file stays, and a later edit works."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    really_open = os.open

    def fail_on(end: str) -> Callable[..., Any]:
        return lambda path, *args, **kwargs: (fail if str(path).endswith(end) else really_open)(path, *args, **kwargs)

    before = pool_file.path.read_bytes()
    with monkeypatch.context() as patch:
        if where in ("open", "lock"):
            patch.setattr(os, "open", fail_on(".tmp" if where == "open" else ".lock"))
        else:
            patch.setattr(os, where, fail)
        with pytest.raises(StorageError, match=r"pool\.yml"):
            pool_file.edit(lambda p: edit.unregister(p, "b"))
    assert pool_file.path.read_bytes() == before
    assert {p.name for p in pool_file.path.parent.iterdir()} <= {"pool.yml", "pool.yml.lock"}
    assert pool_file.edit(lambda p: edit.unregister(p, "b")).names == ["a", "x"]


def test_what_a_killed_writer_left_is_written_over(pool_file: PoolFile) -> None:
    """One temporary file at the most, and after the next edit none; a link in its place is not followed."""
    leftover = pool_file.path.with_name(".pool.yml.tmp")
    for alias, leave in (("y", lambda: leftover.write_text("models: [")), ("z", lambda: leftover.symlink_to("there"))):
        leave()
        assert pool_file.edit(lambda p, to=alias: edit.set_alias(p, "b", to)).find(alias)
        assert {p.name for p in pool_file.path.parent.iterdir()} <= {"pool.yml", "pool.yml.lock"}


def test_a_file_locked_for_too_long_is_an_error_and_not_a_hang(
    pool_file: PoolFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the lock for ever does not hold us for ever."""
    monkeypatch.setattr("embedpool.config.files.LOCK_TIMEOUT_S", 0.05)
    held, done = threading.Event(), threading.Event()

    def hold(pool: PoolSpec) -> PoolSpec:
        held.set()
        assert done.wait(20)
        return pool

    with ThreadPoolExecutor(1) as other:
        holding = other.submit(pool_file.edit, hold)
        try:
            assert held.wait(20)
            with pytest.raises(StorageError, match="locked"):
                PoolFile(pool_file.path).edit(lambda p: edit.unregister(p, "b"))
        finally:
            done.set()
        holding.result()
    assert pool_file.content() == BLOCK


def test_many_threads_editing_lose_nothing(pool_file: PoolFile) -> None:
    """Every one of many concurrent edits is in the file at the end, and so are its comments."""
    link = pool_file.path.with_name("link.yml")
    link.symlink_to("pool.yml")

    def work(number: int) -> None:
        mine = PoolFile(link if number % 2 else pool_file.path)
        mine.edit(lambda p: edit.register(p, model(f"m{number}")))
        mine.edit(lambda p: edit.register(p, model(f"gone{number}")))
        mine.edit(lambda p: edit.unregister(p, f"gone{number}"))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert sorted(pool_file.read().names) == sorted(["a", "x", "b", *(f"m{i}" for i in range(6))])
    assert sorted(comments(pool_file.content())) == sorted(comments(BLOCK))


# --- showing


@pytest.mark.parametrize(
    ("base_url", "shown"),
    [
        ("http://h:5000/embed", "http://h:5000/embed"),
        ("https://user:pass@h/v1", "https://***@h/v1"),
        ("http://token@h", "http://***@h"),
        ("http://user:p@ss@h/x", "http://***@h/x"),
        ("http://h/x@y", "http://h/x@y"),
    ],
)
def test_credentials_in_a_url_are_not_shown(base_url: str, shown: str) -> None:
    """/models shows where a remote is, not how one logs in there."""
    addresses = {"base_url": base_url, "base_urls": ["http://other", base_url]}
    document = as_document(edit.parse_registration({"model": "m", "driver_type": "http", "driver_config": addresses}))
    config = document["driver"]["config"]
    assert [config["base_url"], *config["base_urls"]] == [shown, "http://other", shown]


@pytest.mark.parametrize(
    "inside",
    [
        "scaling: {idle_ttl_s: 0.5}",
        "scaling: {idle_ttl_s: 1e3}",
        "scaling: {min: 0, max: 0x10}",
        "alias: 'x'",
        'driver: {type: fake, config: {prompts: {q: "query: "}, delay_ms: 0.25}}',
        "driver: {type: http, config: {base_url: 'http://h', timeout_s: 1.5, headers: {X-Key: EMBEDPOOL_SECRET_A}}}",
    ],
)
def test_a_spec_from_the_file_can_be_shown_as_json(inside: str) -> None:
    """However a value is written, /models and /status can answer with it; every key is there, defaults included."""
    shown = orjson.loads(orjson.dumps(as_document(fake_spec(f"model: a, {inside}").models[0])))
    assert list(shown) == ["model", "driver", "alias", "place", "resources", "enabled", "cache", "scaling", "queue"]
    assert list(shown["scaling"]) == ["min", "max", "idle_ttl_s"]


@pytest.mark.parametrize("odd", ["\x85", "a\x85b", "\u2028", "x\u2029", "\t", "\u00a0", "'\"\\"])
def test_any_character_of_a_value_survives_an_edit(odd: str) -> None:
    """Also one that YAML may take for the end of a line, in a value and in a key."""
    old = parse(EMPTY_POOL_YML)
    new = edit.register(old, model("a", driver_config={"prompts": {f"k{odd}": odd}}))
    text = edited(EMPTY_POOL_YML, old, new)
    assert parse(text) == new
    changed = edit.register(new, model("a", driver_config={"prompts": {f"k{odd}": odd + odd}}), replace=True)
    assert parse(edited(text, new, changed)) == changed


def test_the_older_spelling_of_a_place_goes_when_the_place_changes() -> None:
    """A file that says `isolation` is followed and edited like one that says `place`."""
    config = "      config:\n        isolation: process  # apart\n        dim: 3\n"
    text = f"models:\n  - model: a\n    driver:\n      type: fake\n{config}"
    old = parse(text)
    assert old == parse("models: [{model: a, place: process, driver: {type: fake, config: {dim: 3}}}]")
    for place in ("thread", "process"):
        new = edit.register(old, model("a", place=place, alias="x", driver_config={"dim": 3}), replace=True)
        written = edited(text, old, new)
        assert parse(written) == new
        assert ("isolation: process  # apart" in written) == (place == "process")


def test_a_spec_from_the_file_equals_the_same_spec_from_a_request() -> None:
    """Registering over HTTP what stands in the file already is a success."""
    pool = fake_spec(
        'model: a, alias: "x", scaling: {idle_ttl_s: 0.5}, driver: {type: fake, config: {prompts: {q: "a"}}}'
    )
    same = model("a", alias="x", idle_ttl_s=0.5, driver_config={"prompts": {"q": "a"}})
    assert edit.register(pool, same) is pool


def test_a_bad_change_never_reaches_the_file(pool_file: PoolFile) -> None:
    """An alias against the rule of names is refused before anything is written."""
    with pytest.raises(InvalidRequest):
        pool_file.edit(lambda p: edit.set_alias(p, "b", "no good"))
    assert pool_file.content() == BLOCK
