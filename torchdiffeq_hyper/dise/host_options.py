"""Options that the host would only warn about."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torchdiffeq_hyper.errors import OptionError, explain


@contextmanager
def unknown_options_refused(candidate: str, method: str) -> Iterator[None]:
    """Turn the host's warning about options that it ignores into an error."""
    ignored = ".*Unexpected arguments"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=ignored, category=UserWarning)
        try:
            yield
        except UserWarning as warning:
            if not re.match(ignored, str(warning)):
                raise
            raise OptionError(
                explain(
                    f"{candidate} has an option that torchdiffeq does not know ({warning}).",
                    f'options of method "{method}".',
                    f'tdh.Candidate("{method}")   # check the spelling of its options',
                )
            ) from warning
