from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from embedpool.config.config_yml import base_dir_of, find_config_yml, load_settings, parse_settings, unknown_variables
from embedpool.config.sample import sample_config_yml
from embedpool.config.settings import SECTIONS, Client, Settings
from embedpool.errors import ConfigError

CONTRACT = """\
version: 1
client:      {base_url: "http://127.0.0.1:8876"}
server:      {host: "127.0.0.1", port: 8876}
paths:       {root: ".config", pool_yml: ".config/pool.yml", config_yml: ".config/config.yml",
              state_dir: ".config/state", logs_dir: ".config/logs", cache_dir: ".config/cache"}
process:     {pid_file: ".config/state/pool.pid"}
logging:     {level: "info"}
defaults:    {request_timeout_s: 120, max_queue_per_model: 1000, max_inflight_global: 256}
hot_reload:  {enabled: true}
"""


def parse(text: str = "", **environ: str) -> Settings:
    return parse_settings(text, "config.yml", {f"EMBEDPOOL_{k}": v for k, v in environ.items()})


def refusal(text: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, **environ)
    return caught.value.message


# --- the file


@pytest.mark.parametrize("text", ["", "# nothing\n", "version: 1\n", "server:\n", "server: {port: null}\n", CONTRACT])
def test_every_key_may_be_left_out(text: str) -> None:
    """An absent or null key has its default, and the contract's own file states the defaults."""
    assert dataclasses.replace(parse(text), client=Client()) == Settings()


def test_the_sample_file_states_the_defaults() -> None:
    """What `init` writes says, key by key, what holds without it, in block style."""
    text = sample_config_yml()
    assert parse(text) == Settings()
    document = yaml.safe_load(text)
    for section, cls in SECTIONS.items():
        assert list(document[section]) == [f.name for f in dataclasses.fields(cls)]
        for f in dataclasses.fields(cls):
            line = next(
                line for line in text.splitlines() if line.startswith(f"  {f.name}:") and f.metadata["doc"] in line
            )
            assert "#" in line


@pytest.mark.parametrize("root", ["other", "/etc/embedpool", "a b: c # d", "it's", '"', "~", "a/.config"])
def test_the_sample_file_takes_any_root(root: str) -> None:
    """`init --root` is written as given, whatever characters it has."""
    settings = parse(sample_config_yml(root))
    assert settings.paths.root == root
    assert settings.paths.pool_yml == f"{root}/pool.yml"
    assert settings.process.pid_file == f"{root}/state/pool.pid"


def test_all_faults_are_named_at_once_with_file_line_and_key() -> None:
    """Each fault has a line of its own, and an unknown key names the nearest known one."""
    text = "version: 1\nserver:\n  prot: 9\nlogging:\n  level: loud\ndefaults: {max_inflight_global: '12'}\n"
    lines = refusal(text).splitlines()
    assert sorted(line.split(": ")[0:2] for line in lines) == [
        ["config.yml, line 3", "server.prot"],
        ["config.yml, line 5", "logging.level"],
        ["config.yml, line 6", "defaults.max_inflight_global"],
    ]
    assert "did you mean port?" in refusal(text)


def test_an_unknown_section_names_the_nearest() -> None:
    """A misspelt section is not passed over in silence."""
    assert refusal("version: 1\nservr: {}\n") == "config.yml, line 2: servr: unknown key 'servr'; did you mean server?"


@pytest.mark.parametrize(
    "text",
    [
        "version: 2",
        "version: '1'",
        "server: {port: '8876'}",
        "server: {port: 70000}",
        "server: {port: 12.7}",
        "server: {server: flask}",
        "server: [1]",
        "server: 5",
        "hot_reload: {enabled: 'yes'}",
        "defaults: {request_timeout_s: 0}",
        "defaults: {request_timeout_s: .nan}",
        "security: {allowed_hosts: example.org}",
        "batching: {max_wait_ms: 1" + "0" * 400 + "}",
        "base_dir: /tmp",
        "- version",
        "words",
        "server: {port: 1]",
        "\tserver: 1",
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_line(text: str) -> None:
    """Wrong types, values, shapes and syntax are all one kind of error that says where."""
    assert refusal(text + "\n").startswith("config.yml, line 1")


@pytest.mark.parametrize("value", ["2024-13-45", "!!int x", "!!timestamp x", "!!bool x", "1" * 5000])
def test_a_value_yaml_itself_cannot_read_is_a_fault_of_the_file(value: str) -> None:
    """A date of month 13 or a number of 5000 digits is reported like any other fault."""
    assert refusal(f"server: {{host: {value}}}\n").startswith("config.yml")


@given(st.text("server: {port1}[]\n-&*!'\"#|>?%.~,0x\t", max_size=40))
def test_no_text_does_worse_than_be_refused(text: str) -> None:
    """Whatever is in config.yml, the outcome is settings or one error with a sentence."""
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(text), Settings)


# --- the environment


@pytest.mark.parametrize(
    ("variable", "raw", "value"),
    [
        ("SERVER__PORT", "9", 9),
        ("DEFAULTS__REQUEST_TIMEOUT_S", "0.5", 0.5),
        ("HOT_RELOAD__ENABLED", "false", False),
        ("LOGGING__LEVEL", "debug", "debug"),
        ("SECURITY__ALLOWED_HOSTS", "[a.example, b.example]", ("a.example", "b.example")),
        ("SERVER__HOST", "12:30", "12:30"),
        ("SERVER__HOST", "off", "off"),
        ("SERVER__HOST", "1", "1"),
        ("PATHS__ROOT", "[a: b", "[a: b"),
        ("CLIENT__API_KEY_ENV", "0x10", "0x10"),
    ],
)
def test_a_variable_overrides_a_setting(variable: str, raw: str, value: object) -> None:
    """EMBEDPOOL_<SECTION>__<KEY> wins over the file; a setting that is text is taken literally, the rest as YAML."""
    section, key = variable.lower().split("__")
    settings = parse(CONTRACT, **{variable: raw})
    assert getattr(getattr(settings, section), key) == value
    untouched = dataclasses.replace(settings, **{"client": Client(), section: getattr(Settings(), section)})
    assert untouched == Settings()


def test_a_variable_fills_a_section_the_file_leaves_out_or_empty() -> None:
    """The section need not be in the file, and other keys of it keep what the file says."""
    assert parse("", SERVER__PORT="9").server.port == 9
    assert parse("server:\n", SERVER__PORT="9").server.port == 9
    server = parse("server: {host: h, port: 1}", SERVER__PORT="9").server
    assert (server.host, server.port) == ("h", 9)


@pytest.mark.parametrize("raw", ["", "null", "~"])
def test_an_empty_variable_overrides_nothing(raw: str) -> None:
    """null means absent: a variable set to nothing leaves what the file says."""
    assert parse("server: {port: 9}", SERVER__PORT=raw).server.port == 9


@pytest.mark.parametrize(
    ("variable", "raw", "says"),
    [
        ("SERVR__PORT", "9", "did you mean server?"),
        ("SERVER__PROT", "9", "did you mean port?"),
        ("SERVER__PORT", "abc", "whole number"),
        ("SERVER__PORT", "70000", "65535"),
        ("SERVER__PORT", "{", "not a YAML value"),
        ("SERVER__PORT", "2024-13-45", ""),
        ("HOT_RELOAD__ENABLED", "1", "true or false"),
        ("LOGGING__LEVEL", "loud", "must be one of"),
        ("SECURITY__ALLOWED_HOSTS", "a.example", "list"),
    ],
)
def test_a_bad_variable_is_named(variable: str, raw: str, says: str) -> None:
    """The error names the variable, not a line of a file that does not hold it."""
    message = refusal(CONTRACT, **{variable: raw})
    assert f"EMBEDPOOL_{variable}" in message
    assert says in message
    assert "line" not in message


def test_faults_of_the_file_come_first() -> None:
    """A variable does not hide that the file is wrong."""
    assert "config.yml, line 1" in refusal("server: {port: x}", SERVER__PORT="9")


def test_other_variables_are_left_alone() -> None:
    """The config's own path, secrets, and other programs' variables are no settings."""
    environ = {"EMBEDPOOL_CONFIG": "x", "EMBEDPOOL_SECRET_A__B": "k", "OTHER_SERVER__PORT": "x", "SERVER__PORT": "x"}
    assert parse_settings("", "config.yml", environ) == Settings()


# --- where the file is, and what it is relative to


def test_the_file_named_comes_first_then_the_variable_then_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config, else EMBEDPOOL_CONFIG, else .config/config.yml; always absolute."""
    monkeypatch.chdir(tmp_path)
    environ = {"EMBEDPOOL_CONFIG": "b.yml"}
    assert find_config_yml("a.yml", environ) == tmp_path / "a.yml"
    assert find_config_yml(None, environ) == tmp_path / "b.yml"
    assert find_config_yml(None, {"EMBEDPOOL_CONFIG": ""}) == tmp_path / ".config/config.yml"
    assert find_config_yml(None, {}) == tmp_path / ".config/config.yml"


@pytest.mark.parametrize(
    ("file", "config_yml", "base"),
    [
        ("/srv/x/.config/config.yml", ".config/config.yml", "/srv/x"),
        ("/srv/x/.config/config.yml", "./.config/config.yml", "/srv/x"),
        ("/srv/x/config.yml", ".config/config.yml", "/srv/x"),
        ("/srv/x/my.config/config.yml", ".config/config.yml", "/srv/x/my.config"),
        ("/srv/x/a/b/c.yml", "a/b/c.yml", "/srv/x"),
        ("/srv/x/c.yml", "c.yml", "/srv/x"),
        ("/srv/x/c.yml", "/srv/x/c.yml", "/srv/x"),
        ("/srv/x/c.yml", "/elsewhere/c.yml", "/srv/x"),
        ("/c.yml", "a/b/c.yml", "/"),
        ("/srv/x/c.yml", "", "/srv/x"),
    ],
)
def test_relative_paths_start_where_the_file_says(file: str, config_yml: str, base: str) -> None:
    """If the file's path ends in its own `paths.config_yml`, from what precedes that; otherwise from its folder."""
    assert base_dir_of(Path(file), config_yml) == Path(base)


def test_a_file_means_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are absolute once loaded, whether the file was named relatively or not."""
    folder = tmp_path / ".config"
    folder.mkdir()
    (folder / "config.yml").write_text("paths: {cache_dir: /var/cache/e}\n")
    monkeypatch.chdir(folder)
    relative = load_settings(Path("config.yml"), {})
    monkeypatch.chdir("/")
    for settings in (relative, load_settings(folder / "config.yml", {})):
        assert settings.file(settings.paths.pool_yml) == folder / "pool.yml"
        assert settings.file(settings.paths.cache_dir) == Path("/var/cache/e")


@pytest.mark.parametrize("kind", ["missing", "folder", "latin-1"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    """No file, a folder in its place, or bytes that are no text: one sentence with the path."""
    file = tmp_path / "config.yml"
    if kind == "folder":
        file.mkdir()
    elif kind == "latin-1":
        file.write_bytes(b"logging: {level: \xe9}\n")
    with pytest.raises(ConfigError, match=r"config\.yml"):
        load_settings(file, {})


def test_threads_default_to_what_is_admitted_and_a_reserve() -> None:
    """0 threads means enough for every admitted request, every body of lines, and for management beside them."""
    assert parse("defaults: {max_inflight_global: 100, max_streams: 5}").threads == 121
    assert parse("server: {threads: 7}").threads == 7


def test_the_command_line_looks_where_the_server_listens() -> None:
    """Unless it is told another address; a server at every address is reached at this machine's own."""
    assert parse("server: {port: 9000}").base_url == "http://127.0.0.1:9000"
    assert parse("server: {port: 9000, host: '::'}").base_url == "http://[::1]:9000"
    assert parse("server: {port: 9000}\nclient: {base_url: 'http://h:1'}").base_url == "http://h:1"


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("'off'", "off"), ("required", "required")])
def test_off_is_a_word(written: str, meant: str) -> None:
    """YAML takes it for false."""
    assert parse(f"security: {{keys: {written}}}").security.keys == meant


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("EMBEDPOOL_SERVER_PORT", "EMBEDPOOL_SERVER__PORT"),
        ("EMBEDPOOL_LOGGING_LEVEL", "EMBEDPOOL_LOGGING__LEVEL"),
        ("EMBEDPOOL_DEFAULT_REQUEST_TIMEOUT_S", "EMBEDPOOL_DEFAULTS__REQUEST_TIMEOUT_S"),
        ("EMBEDPOOL_SERVICE_HOST", None),
        ("EMBEDPOOL_PORT_8876_TCP_ADDR", None),
        ("EMBEDPOOL_CONFIG", None),
        ("EMBEDPOOL_SECRET_SERVER_PORT", None),
        ("OTHER_SERVER_PORT", None),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_told(variable: str, near: str | None) -> None:
    """Not what Kubernetes sets by itself, and no secret."""
    assert unknown_variables({variable: "1"}) == ({variable: near} if near else {})


@pytest.mark.parametrize("raw", ["9", "'9'", '"9"'])
def test_a_variable_may_stand_in_quotation_marks(raw: str) -> None:
    """`docker run --env-file` keeps those of the file."""
    assert parse_settings(CONTRACT, "c", {"EMBEDPOOL_SERVER__PORT": raw}).server.port == 9
    host = parse_settings(CONTRACT, "c", {"EMBEDPOOL_SERVER__HOST": raw.replace("9", "::1")}).server.host
    assert host == "::1"


def test_words_may_be_in_any_case() -> None:
    """INFO is a level, as elsewhere."""
    assert parse_settings("version: 1\nlogging: {level: INFO}\n", "c", {}).logging.level == "info"
    assert parse_settings("version: 1\n", "c", {"EMBEDPOOL_SERVER__SERVER": "Waitress"}).server.server == "waitress"


def test_an_ipv6_address_may_stand_in_brackets() -> None:
    """As in a URL."""
    assert parse_settings('version: 1\nserver: {host: "[::1]"}\n', "c", {}).server.host == "::1"
