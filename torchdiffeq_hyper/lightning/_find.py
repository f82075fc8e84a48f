"""Lightning, under whichever of its two names."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torchdiffeq_hyper.errors import MissingExtraError, explain


def find_lightning() -> Any:
    """Return Lightning under the name it is already used by, or is installed as.

    Raises:
        MissingExtraError: it is not installed.
    """
    names = ("pytorch_lightning", "lightning.pytorch")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in {name, name.partition(".")[0]}:
                raise
    raise MissingExtraError(
        explain(
            "torchdiffeq_hyper.lightning needs Lightning, which is not installed.",
            "pytorch_lightning, or lightning.",
            'pip install "torchdiffeq_hyper[lightning]"',
        )
    )
