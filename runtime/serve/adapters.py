"""The scales at which the model's adapters work: those of everybody, and those that a request asks for.

llama-server (0c1e570, tools/server) goes on from what it computed with other scales: a slot is cleared only for a
request that names scales which differ from the slot's last ones (launch_slot_with_task), and its store of finished
prompts knows no scales. So each request names them here, and that store is off (``command.model_options``). It also
takes an id that it does not have, or a scale that is no number, for "all adapters off" (parse_lora_request): refused
here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from runtime.adapters import MAX_SCALE
from runtime.serve.replies import Refusal, refusal

# Not /v1/messages, whose conversion keeps a few fields, nor what makes vectors: they work at everybody's scales.
_TAKES: Final = frozenset(
    [
        "/completion",
        "/completions",
        "/v1/completions",
        "/chat/completions",
        "/v1/chat/completions",
        "/responses",
        "/v1/responses",
        "/infill",
    ]
)
_MAY: Final = re.compile(rb'"lora"|\\u00[67]')  # the second: a letter of it spelled as a number
_FORM: Final = '[{"id": 0, "scale": 0.5}]'


class Adapters:
    """Their scales by id; a llama-server that was started again has those of the command line."""

    def __init__(self, scales: Sequence[float]) -> None:
        self._at_start = tuple(scales)
        self._now = self._at_start
        self._restarts = 0

    def asked(self, body: bytes) -> tuple[float, ...]:
        """What a body of ``POST /lora-adapters`` asks for: a scale for each id, 0 for those not named; else Refusal."""
        try:
            return self._scales(json.loads(body))
        except (ValueError, RecursionError):
            raise _refused("the body is not JSON") from None

    def set(self, scales: tuple[float, ...], *, restarts: int) -> None:
        """Work at these for everybody, until llama-server has been started more than ``restarts`` times."""
        self._now, self._restarts = scales, restarts

    def settled(self, label: str, body: bytes, *, restarts: int) -> bytes:
        """The body of a request to the endpoint ``label``, which names the scales that it is to be answered with.

        Refusal where it asks for scales that cannot be had, and for a body in which none can be named: llama-server
        reads JSON that Python does not, such as an object with a zero byte behind it.
        """
        names = bool(self._at_start) and label in _TAKES
        if not names and not _MAY.search(body):
            return body
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            if names:
                raise _refused("the body is no JSON object")
            return body
        own = document.get("lora", [])
        if own != [] and label not in _TAKES:
            raise _refused(f"{label} takes no lora; POST /lora-adapters sets the scales for everybody")
        scales = self._scales(own) if own != [] else self._current(restarts)
        if not names:
            return body
        document["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
        document.setdefault("cache_prompt", True)
        return json.dumps(document).encode()

    def _current(self, restarts: int) -> tuple[float, ...]:
        if restarts != self._restarts:
            self.set(self._at_start, restarts=restarts)
        return self._now

    def _scales(self, asked: Any) -> tuple[float, ...]:
        if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
            raise _refused(f"lora is a list such as {_FORM}")
        found = dict.fromkeys(range(len(self._at_start)), 0.0)
        for each in asked:
            number, scale = each.get("id"), each.get("scale")
            if type(number) is not int or number not in found:
                have = ", ".join(map(str, found)) or "none is loaded"
                raise _refused(f"there is no adapter {json.dumps(number)}; ids: {have} (GET /lora-adapters)")
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_SCALE:
                raise _refused(f"the scale of adapter {number} is {json.dumps(scale)}, not a number that float32 holds")
            found[number] = float(scale)
        return tuple(found.values())


def _refused(said: str) -> Refusal:
    return refusal("lora", 400, said, close=False)
