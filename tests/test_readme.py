"""What the README and the pages in docs/ say is run as it stands there, and so is every example.

The Python blocks of a page run in order in one namespace, its commands between them, all in one
empty folder. Links, the README's length and the order of its headings are checked as well.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.methods import _registry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
EXAMPLES = sorted((ROOT / "examples").rglob("[a-z]*.py"))
LANGUAGES = {"python", "bash", "text", "toml"}
HEADINGS = [
    "# torchdiffeq_hyper",
    "## Install",
    "## Quick start",
    "## What it gains",
    "## Which solver, and when none",
    "## Methods",
    "## Documentation",
]
TIMEOUT = 600

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, first line number and text."""

    language: str
    line: int
    code: str

    @property
    def commands(self) -> list[str]:
        """The shell commands of the block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _blocks(page: Path) -> Iterator[Block]:
    language: str | None = None
    start, code = 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"```(\S*)\s*$", line)
        if language is None and fence:
            language, start, code = fence[1], number + 1, []
        elif fence:
            yield Block(language or "", start, "\n".join(code))
            language = None
        elif language is not None:
            code.append(line)
    assert language is None, f"{page.name}: the block at line {start} has no end"


def _prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def _headings(page: Path) -> list[str]:
    return re.findall(r"^#+ .+$", _prose(page), re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a page's headings."""
    titles = (heading.lstrip("# ").lower() for heading in _headings(page))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An empty folder to read a page in; published methods are taken back after it."""
    monkeypatch.chdir(tmp_path)
    before = _registry.methods()
    main = ModuleType("__main__")
    # torch's compiler looks a function's globals up in its module.
    monkeypatch.setitem(sys.modules, "__main__", main)
    yield vars(main)
    added = {m.name: m.owner for m in _registry.methods().values() if m.name not in before}
    for name, owner in added.items():
        if owner == "register_method":
            tdh.unregister_method(name)
    for owner in set(added.values()) - {"register_method"}:
        tdh.unregister_plugin(owner)


def _environment() -> dict[str, str]:
    scripts = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg"}


def _run(*command: str) -> str:
    done = subprocess.run(
        command, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _run_command(command: str) -> None:
    """Run a command of a page; look up what a CI step or another test here runs."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "pip":
        return
    if program == "make":
        assert set(arguments) <= _make_targets(), f"the Makefile has no {command!r}"
    elif program == "python" and arguments[0].startswith("examples/"):
        assert ROOT / arguments[0] in EXAMPLES, f"there is no {arguments[0]}"
        if len(arguments) > 1:
            _run(sys.executable, str(ROOT / arguments[0]), *arguments[1:], "--quick")
    else:
        _run("bash", "-euo", "pipefail", "-c", command)


def _make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_readme_is_short_and_its_headings_are_in_order() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert _headings(README) == HEADINGS


def test_readme_leads_to_every_page() -> None:
    linked = {target for target, _ in _links(README)}
    assert [page.name for page in DOCS if page not in linked] == []


def test_figures_of_the_readme_are_those_of_the_full_table() -> None:
    def rows(page: Path) -> list[dict[str, str]]:
        found, head = list[dict[str, str]](), list[str]()
        for line in _prose(page).splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if "|" in line else []
            if cells and not head:
                head = cells
            elif cells:
                found.append(dict(zip(head, cells, strict=False)))
            else:
                head = []
        return [row for row in found if re.search(r"\d\.\d", row.get("rel. L2", ""))]

    full, measured = rows(ROOT / "docs" / "measurements.md"), rows(README)
    assert len(measured) == 6
    assert [row for row in measured if not any(row.items() <= of.items() for of in full)] == []


@each_page
def test_page_has_one_title_and_blocks_of_a_kind_the_tests_know(page: Path) -> None:
    headings = _headings(page)
    assert page.read_text(encoding="utf-8").startswith(headings[0])
    assert [heading for heading in headings if heading.startswith("# ")] == headings[:1]
    assert {block.language for block in _blocks(page)} <= LANGUAGES


def _links(page: Path) -> list[tuple[Path, str]]:
    """Return file and anchor of each link to a place in the repository."""
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", _prose(page))
    parts = (target.partition("#") for target in targets)
    return [((page.parent / name).resolve() if name else page, tag) for name, _, tag in parts]


@each_page
def test_links_and_named_files_are_there(page: Path) -> None:
    links = _links(page)
    assert [str(target) for target, _ in links if not target.exists()] == []
    assert [f"{target}#{tag}" for target, tag in links if tag and tag not in _anchors(target)] == []
    named = re.findall(r"`((?:examples|tests|docs)/[^`*\s]*)`", _prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


# torchflows 1.2.1 indexes its base distribution with a list; Lightning 2.6 gives advice on
# loaders, logs and checkpoints, and uses what torch 2.13 deprecates; so does torch's compiler.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each_page
def test_page_runs(page: Path, reader: dict[str, Any]) -> None:
    for block in _blocks(page):
        if block.language == "python":
            # Blank lines in front give tracebacks the page's own line numbers.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(page), "exec"), reader)
        elif block.language == "bash":
            for command in block.commands:
                _run_command(command)


def test_make_demo_runs_the_digits_example() -> None:
    recipe = _run("make", "--dry-run", "--directory", str(ROOT), "demo")
    assert "python examples/a1_digits.py" in recipe


def _promised(example: Path) -> list[str]:
    """Return the files that an example's docstring says it writes."""
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    promise = re.search(r"^Writes (.+?)(?:\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    return re.findall(r"[\w-]+\.(?:png|md|csv|safetensors)\b", promise[1]) if promise else []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_writes_what_its_docstring_promises(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    promised = _promised(example)
    where = ["--out", str(tmp_path / "out")] if promised else []
    _run(sys.executable, str(example), "--quick", *where)
    missing = [name for name in promised if not (tmp_path / "out" / name).is_file()]
    assert not missing
