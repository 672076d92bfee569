"""The documents say what the code does."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from embedpool.cli import main
from embedpool.config.pool_yml import parse
from embedpool.config.settings import Settings
from embedpool.pool.pool import Pool
from embedpool.reconcile import Reconciler
from embedpool.web.app import create_app
from embedpool.web.metrics import Metrics
from embedpool.web.schemas import OptionsSchema
from tests.docs import README, written

ROOT = Path(__file__).parents[1]
TEXT = README.read_text()


def test_the_generated_parts_are_current() -> None:
    """The manual, the tables of settings and the error codes are those of the code; `make docs` writes them."""
    assert written(TEXT) == TEXT


def test_every_route_is_documented(pool: Pool) -> None:
    """A path that is not in the README does not exist for a user."""
    app = create_app(pool, Reconciler.__new__(Reconciler), Settings(), Metrics())
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", "<name>", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in TEXT, f"{method} {path}"


def test_every_option_of_embed_is_documented() -> None:
    """The option table of POST /embed is complete."""
    for name in OptionsSchema._declared_fields:
        assert f"| `{name}` |" in TEXT


def test_every_dependency_has_a_reason() -> None:
    """The dependency table names what setup.cfg installs, and nothing else."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = {re.split(r"[><=\[]", line)[0] for line in parser["options"]["install_requires"].split()}
    for extra in ("demo", "openvino", "otel"):
        wanted |= {re.split(r"[><=\[]", line)[0] for line in parser["options.extras_require"][extra].split()}
    table = TEXT[TEXT.index("## Dependencies") :]
    named = set(re.findall(r"^\| `([\w.-]+)`", table[: table.index("\n## ", 5)], flags=re.MULTILINE))
    assert named == wanted


@pytest.mark.parametrize("block", re.findall(r"```yaml\n# pool\.yml\n(.*?)```", TEXT, flags=re.DOTALL))
def test_the_examples_of_pool_yml_are_valid(block: str) -> None:
    """What a reader pastes loads."""
    assert parse(block).models


def test_help_is_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    """`embedpool --help` prints what the README shows."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.strip() in TEXT


def test_nothing_committed_names_this_machine() -> None:
    """No absolute path of a developer's machine in what users read."""
    for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md", "tests/chaos/README.md"):
        file = ROOT / name
        if file.exists():
            assert not re.search(r"(?<![\w.])/(work|root|home)/", file.read_text()), name
