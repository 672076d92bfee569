"""The documents say what the code does."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
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
from tests.docs import PAGES, PARTS, ROOT, written

README = ROOT / "README.md"
DOCS = {page.name: page.read_text() for page in sorted(PAGES.glob("*.md"))}
EXAMPLES = [
    block for text in DOCS.values() for block in re.findall(r"```yaml\n# pool\.yml\n(.*?)```", text, flags=re.DOTALL)
]


@pytest.mark.parametrize("page", PARTS)
def test_the_generated_parts_are_current(page: str) -> None:
    """The manual, settings, error codes, metrics are those of the code; `make docs` writes them."""
    assert written(page) == DOCS[page]


def test_the_site_is_whole(tmp_path: Path) -> None:
    """Every page is in the navigation and no link is broken: mkdocs's strict build takes a warning for an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "conf" / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "http-api" in (tmp_path / "site" / "index.html").read_text()


def test_the_readme_is_a_page_to_begin_with() -> None:
    """It is short, and what it refers to exists."""
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_every_route_is_documented(pool: Pool) -> None:
    """A path that is not in the docs does not exist for a user."""
    app = create_app(pool, Reconciler.__new__(Reconciler), Settings(), Metrics())
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", "<name>", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in DOCS["http-api.md"], f"{method} {path}"


def test_every_option_of_embed_is_documented() -> None:
    """The option table of POST /embed is complete."""
    for name in OptionsSchema._declared_fields:
        assert f"| `{name}` |" in DOCS["http-api.md"]


def test_every_dependency_has_a_reason() -> None:
    """The dependency table names what setup.cfg installs, and nothing else."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = {re.split(r"[><=\[]", line)[0] for line in parser["options"]["install_requires"].split()}
    for extra in ("demo", "openvino", "files", "otel", "ray", "cache"):
        wanted |= {re.split(r"[><=\[]", line)[0] for line in parser["options.extras_require"][extra].split()}
    text = DOCS["contributing.md"]
    named = set(re.findall(r"^\| `([\w.-]+)`", text[text.index("## Dependencies") :], flags=re.MULTILINE))
    assert named == wanted


@pytest.mark.parametrize("block", EXAMPLES)
def test_the_examples_of_pool_yml_are_valid(block: str) -> None:
    """What a reader pastes loads."""
    assert parse(block).models


def test_help_is_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    """`embedpool --help` prints what the docs show."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.strip() in DOCS["command-line.md"]


def test_nothing_committed_names_this_machine() -> None:
    """No absolute path of a developer's machine in what users read."""
    read = [ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md", "tests/chaos/README.md")]
    for file in (*read, *PAGES.glob("*.md")):
        assert not re.search(r"(?<![\w.])/(work|root|home)/", file.read_text()), file
