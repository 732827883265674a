"""What ``finetune`` prints while it runs (``train_opt_callback`` and ``tokenize_file`` in common/train.cpp)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

_ITERATION: Final = re.compile(r"\biter=\s*(\d+)\b.*?\bloss=(\S+)")
_START: Final = re.compile(r"\bopt iter (\d+)")
_TOKENS: Final = re.compile(r"number of training tokens: (\d+)")
_OTHER_DATA: Final = "train data seems to have changed"


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """``loss`` is the mean cross entropy (nats a token) that ``step`` was computed from, six digits behind the point.

    The first line of a run bears the step that it starts from, and a loss of 0 that means nothing.
    """

    step: int
    loss: float


def parse_iteration(line: str) -> Iteration | None:
    """The step that a line tells of; a loss that is no number becomes nan."""
    if not (found := _ITERATION.search(line)):
        return None
    try:
        return Iteration(step=int(found[1]), loss=float(found[2]))
    except ValueError:
        return Iteration(step=int(found[1]), loss=math.nan)


def parse_start(line: str) -> int | None:
    """The step that the trainer goes on from: 0 when it did not take the checkpoint that it was given."""
    return int(found[1]) if (found := _START.search(line)) else None


def parse_tokens(line: str) -> int | None:
    """How many tokens the text has."""
    return int(found[1]) if (found := _TOKENS.search(line)) else None


def tells_other_data(line: str) -> bool:
    """Whether the trainer says that the text is not the one its checkpoint was trained on; a new one always is."""
    return _OTHER_DATA in line
