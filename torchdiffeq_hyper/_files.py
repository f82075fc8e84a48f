"""The package's files: safetensors with a JSON description in the header, read without code."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from torchdiffeq_hyper._rules import ANYTHING, FIX, Mismatch, Record, Rule, Table, Text, Whole
from torchdiffeq_hyper.errors import FileFormatError, HyperError, unwritable

FORMAT_VERSION = 1
HEADER: dict[str, Rule] = {"format_version": Whole(1), "kind": Text(100)}
"""What every file says of itself; the rest depends on the kind."""

_KEY = "torchdiffeq_hyper"


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    kind: str,
    metadata: Mapping[str, Any],
) -> None:
    """Write tensors and their JSON-ready description; ``kind`` is what `read` asks for."""
    # Tied and strided weights are copied apart: the format knows neither.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"format_version": FORMAT_VERSION, "kind": kind, **metadata}
    write_bytes(path, to_bytes(copies, {_KEY: json.dumps(header)}))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``: complete, or not at all; an old file stays until then."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write` wrote: tensors, on the CPU, and metadata."""
    metadata = read_metadata(path)
    if metadata["kind"] != kind:
        problem, fix = (
            f"holds a {metadata['kind']!r}.",
            "the loader that belongs to the file's kind",
        )
        raise _refusal(path, problem, f"a file of kind {kind!r}.", fix)
    tensors: dict[str, Tensor] = {}
    with _open(path) as file, refused(repr(os.fspath(path))):
        for name in file.keys():  # noqa: SIM118
            try:
                # Cloned: the file may be replaced while the tensors live.
                tensors[name] = file.get_tensor(name).clone()
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                # A dtype or size that this torch has not.
                problem = f"its tensor {name!r} cannot be read: {error}"
                raise Mismatch(problem, "tensors that torch can hold") from error
    return tensors, metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the description in a file of any kind."""
    with _open(path) as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        expected = "a file that `save` of this package wrote."
        fix = "solver.save(path)   # weights alone: safetensors.torch.load_file(path)"
        raise _refusal(path, "is a safetensors file of another program.", expected, fix)
    with damage_reported(path):
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"it is no JSON: {error}"
            raise Mismatch(problem, "what `save` writes") from error
        Table(ANYTHING).check(metadata, "")
        given = {name: metadata[name] for name in HEADER if name in metadata}
        header = Record(HEADER).check(given, "")
    if header["format_version"] > FORMAT_VERSION:
        problem = f"has format {header['format_version']}."
        expected = f"a format up to {FORMAT_VERSION}, which is what this version knows."
        raise _refusal(path, problem, expected, "pip install -U torchdiffeq_hyper")
    return dict(metadata)


def _refusal(
    path: str | os.PathLike[str], problem: str, expected: str, fix: str
) -> FileFormatError:
    return FileFormatError(f"{os.fspath(path)!r} {problem}", expected, fix)


@contextmanager
def refused(what: str, fix: str = FIX) -> Iterator[None]:
    """Turn the refusal of what was read, e.g. "the checkpoint", into a `FileFormatError`."""
    try:
        yield
    except FileFormatError:
        raise
    except HyperError as error:
        raise FileFormatError(
            problem=f"{what} cannot be used: {error.problem}",
            expected=error.expected or "what `save` wrote.",
            fix=error.fix if isinstance(error, Mismatch) else fix,
        ) from error


def checked(rule: Rule, value: object, what: str, at: str = "") -> Any:
    """Return what was read from ``what``, at the place ``at`` in it, if its rule takes it."""
    with refused(what):
        return rule.check(value, at)


def from_plain(hint: Any, value: Any) -> Any:
    """Return what an annotation says, e.g. dataclasses and tuples, from a value read from JSON."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        fields = {name: from_plain(hints[name], item) for name, item in value.items()}
        return hint(**fields)  # type: ignore[operator]
    if origin is UnionType:  # of a kind and None
        return None if value is None else from_plain(arguments[0], value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(from_plain(kind, item) for kind, item in zip(kinds, value, strict=True))
    return float(value) if hint is float else value


def described_in(path: str | os.PathLike[str]) -> str:
    """Return how messages call the description in a file."""
    return f"the description in {os.fspath(path)!r}"


@contextmanager
def damage_reported(path: str | os.PathLike[str]) -> Iterator[None]:
    """Report what is refused of a file's contents as a `FileFormatError`."""
    fix = "install the plugin that adds the file's method, or fit and save again"
    with refused(described_in(path), fix):
        yield


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if Path(path).is_dir():
        raise _refusal(path, "is a folder.", "a file that `save` wrote.", "name the file")
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        with Path(path).open("rb") as raw:
            head = raw.read(9)
        # Eight bytes of length, then JSON: all that tells a cut-off file from a foreign one.
        is_cut = len(head) < 9 or head[8:] == b"{"
        state = f"truncated or damaged: {error}" if is_cut else "not a safetensors file."
        expected = "a complete file that `save` wrote."
        raise _refusal(path, f"is {state}", expected, "copy or save it again") from error
