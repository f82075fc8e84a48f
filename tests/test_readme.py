"""What the README says is run as it stands there, and so is every example.

Each fenced block is run on its own in an empty folder; one below the comment
``<!-- continues -->`` goes on where the Python above ended: same folder, same names.
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
EXAMPLES = sorted((ROOT / "examples").rglob("[a-z]*.py"))
LANGUAGES = {"python", "bash", "console", "text", "bibtex", "toml"}
TIMEOUT = 600


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, first line number, text, and whether it goes on."""

    language: str
    line: int
    code: str
    continues: bool

    @property
    def commands(self) -> list[str]:
        """The shell commands of the block; of a console, the lines behind the prompts."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _blocks(text: str) -> Iterator[Block]:
    above, start = "", 0
    language: str | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"```(\S*)\s*$", line)
        if language is None and fence:
            language, start, code = fence[1], number + 1, []
        elif fence:
            yield Block(language or "", start, "\n".join(code), above == "<!-- continues -->")
            above, language = "", None
        elif language is not None:
            code.append(line)
        elif line.strip():
            above = line.strip()


def _chains() -> list[list[Block]]:
    chains: list[list[Block]] = []
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    for block in _blocks(text):
        if block.continues:
            next(chain for chain in chains[::-1] if chain[0].language == "python").append(block)
        elif block.language in {"python", "bash", "console"}:
            chains.append([block])
    return chains


CHAINS = _chains()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """An empty folder to read the README in; published methods are taken back after it."""
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
    """Run a command of the README; look up what a CI step or another test here runs."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "pip" or (program, *arguments[:1]) == ("git", "clone"):
        return
    if program == "make":
        assert set(arguments) <= _make_targets(), f"the Makefile has no {command!r}"
    elif program == "cd":
        assert arguments == [tdh.__name__], "the README leaves the repository"
    elif program == "python" and arguments[0].startswith("examples/"):
        assert ROOT / arguments[0] in EXAMPLES, f"there is no {arguments[0]}"
        if len(arguments) > 1:
            _run(sys.executable, str(ROOT / arguments[0]), *arguments[1:], "--quick")
    else:
        _run("bash", "-euo", "pipefail", "-c", command)


def _make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_readme_exists_and_every_block_is_of_a_kind_the_tests_know() -> None:
    found = {block.language for block in _blocks(README.read_text(encoding="utf-8"))}
    assert {"python", "bash"} <= found <= LANGUAGES


def test_files_that_the_readme_names_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^):#]+)\)", text)
    named = re.findall(r"`((?:examples|tests)/[^`*\s]*)`", text)
    assert [name for name in linked + named if not (ROOT / name).exists()] == []


# torchflows 1.2.1 indexes its base distribution with a list; Lightning 2.6 gives advice on
# loaders, logs and checkpoints, and uses what torch 2.13 deprecates; so does torch's compiler.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.filterwarnings("ignore:::pytorch_lightning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"line{chain[0].line}")
def test_readme_block_runs(chain: list[Block], reader: dict[str, Any]) -> None:
    for block in chain:
        if block.language == "python":
            # Blank lines in front give tracebacks the README's own line numbers.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(README), "exec"), reader)
        else:
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
