"""The same prompts answered by the base and by the base with an adapter, greedily, through ``python -m runtime``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolchain.base import command
from toolchain.base.chat_template import ChatTemplate, chat_template
from toolchain.base.errors import ArtifactError
from toolchain.base.files import PROJECT_ROOT
from toolchain.base.gguf import read_header
from toolchain.base.harmless import harmless

MOST_TOGETHER: Final = 16
"""Prompts that the runtime decodes together."""
MOST_CONTEXT: Final = 4096
"""Tokens that those share."""


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What the base answered to ``prompt`` and what it answers with the adapter."""

    prompt: str
    before: str
    after: str


def replies(
    prompts: Sequence[str], model: Path, adapter: Path | None, *, n: int, log: Path, merged: Path | None = None
) -> tuple[Replies, ...]:
    """Each of at most ``n`` tokens, the likeliest each time. A model with a chat template is asked as in a chat, one
    without goes on from the prompt as it stands. ``merged`` answers in place of ``model`` with ``adapter``.
    """
    header = read_header(model)
    template = chat_template(header) if header.chat_template is not None else None
    asked = [_rendered(prompt, template) for prompt in prompts]
    groups = list(_groups(asked, n, min(header.n_ctx_train or MOST_CONTEXT, MOST_CONTEXT)))
    before, after = (
        [text for group in groups for text in _complete(group, one, lora, n, log)]
        for one, lora in ((model, None), (merged or model, adapter))
    )
    triples = zip(prompts, before, after, strict=True)
    return tuple(Replies(prompt=prompt, before=old, after=new) for prompt, old, new in triples)


def as_markdown(found: Sequence[Replies], *, title: str) -> str:
    """A document in which a model's words are text, whatever they are: nothing in them ends the block they stand in."""
    parts = [f"# {title}\n"]
    for number, each in enumerate(found, start=1):
        for head, text in ((f"## {number}", each.prompt), ("Before:", each.before), ("After:", each.after)):
            parts.append(f"{head}\n\n{fenced(text)}\n")
    return "\n".join(parts)


def fenced(text: str) -> str:
    """``text`` as a code block whose fence is longer than any run of backticks in it."""
    shown = harmless(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}{'' if shown.endswith(chr(10)) else chr(10)}{fence}"


def _rendered(prompt: str, template: ChatTemplate | None) -> str:
    return template.render([{"role": "user", "content": prompt}]) if template else prompt


def _groups(prompts: Sequence[str], n: int, n_ctx: int) -> Iterator[list[str]]:
    """Prompts that fit together into a context of ``n_ctx`` tokens, replies included; a token has a byte at least."""
    group: list[str] = []
    room = n_ctx
    for prompt in prompts:
        wanted = len(prompt.encode()) + 8 + n
        if group and (wanted > room or len(group) == MOST_TOGETHER):
            yield group
            group, room = [], n_ctx
        group.append(prompt)
        room -= wanted
    if group:
        yield group


def _complete(prompts: Sequence[str], model: Path, adapter: Path | None, n: int, log: Path) -> list[str]:
    lora = ("--lora", str(adapter)) if adapter else ()
    options = ("--max-tokens", str(n), "--temp", "0", "--json", "--no-stats", "--no-tune", *lora)
    told = command.run(
        (sys.executable, "-m", "runtime", "complete", str(model), *options, *(f"--prompt={p}" for p in prompts)),
        what=f"asking {model.name}{' with the adapter' if adapter else ''}",
        cwd=PROJECT_ROOT,
        log=log,
    ).output
    answered = _object(told)
    texts = [one["text"] for one in answered.get("replies", [answered]) if "text" in one]
    if len(texts) != len(prompts):
        raise ArtifactError(f"{len(texts)} of {len(prompts)} prompts were answered", evidence=told[-2000:])
    return texts


def _object(told: str) -> dict[str, Any]:
    """The JSON object among what the child said, with warnings before or behind it."""
    start = re.search(r"^\{$", told, re.MULTILINE)
    try:
        value, _ = json.JSONDecoder().raw_decode(told, start.start() if start else 0)
    except ValueError as error:
        raise ArtifactError("the runtime's answer is no JSON", evidence=told[-2000:]) from error
    return value if isinstance(value, dict) else {}
