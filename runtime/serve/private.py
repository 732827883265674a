"""What llama-server tells of this machine beside what was asked, kept from clients: paths, and commands with paths."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Final

PRIVATE: Final = frozenset(["/models", "/v1/models", "/props", "/lora-adapters"])


def public(body: bytes) -> bytes:
    """The reply of one of ``PRIVATE`` without the command and the preset of each model, and with a file's name for
    its path."""
    try:
        told = json.loads(body)
    except ValueError:
        return body
    if isinstance(told, list):  # of adapters
        told = [{**each, "path": PurePath(each["path"]).name} for each in told]
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    if "model_path" in told:
        told["model_path"] = PurePath(told["model_path"]).name
    for model in told.get("data", ()):
        for name in ("args", "preset"):
            (model.get("status") or {}).pop(name, None)
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
