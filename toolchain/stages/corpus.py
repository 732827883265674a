"""English text that is on every machine with CPython: the language reference behind `help()`.

`pydoc_data.topics` holds some 80 topics, 465 KB in CPython 3.11, under the PSF licence. It feeds the
demo model: the train part makes tokenizer and weights, and calibrates the importance matrix; the
held-out part measures perplexity.

Topics nest and repeat: `compound` contains `if`, `for`, `with` and nine more word for word. A split by
topic name alone would therefore score the model on text it was trained on. So topics that share a
paragraph form one group, a group goes to one part as a whole, and a topic whose every paragraph stands
in another topic adds no text (its paragraphs are there already). About 90 KB fall away; no paragraph
is lost. The text depends on the Python version, so whoever caches something made from it keys it by
`corpus_digest`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Mapping
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.10
_TOPIC_SEPARATOR = "\n\n"
# Shorter paragraphs ("See also:", a grammar line) recur without telling anything about their neighbours.
_SHARED_PARAGRAPH_CHARS = 60


def python_docs(split: Split) -> str:
    """The text of one part: its topics in name order, as pydoc prints them, ending in a newline."""
    topics = _topics()
    repeated = repeated_topics(topics)
    parts = (topics[name].strip() for name in topic_names(split) if name not in repeated)
    return _TOPIC_SEPARATOR.join(parts) + "\n"


def corpus_digest(split: Split) -> str:
    """sha256 (hex) of the UTF-8 text of one part: what a cache of anything made from it is keyed by."""
    return hashlib.sha256(python_docs(split).encode()).hexdigest()


def topic_names(split: Split) -> tuple[str, ...]:
    """The topics of one part, sorted; the two parts together name every topic once."""
    topics = _topics()
    heldout = heldout_topics(topics)
    return tuple(name for name in sorted(topics) if (name in heldout) == (split == "heldout"))


def heldout_topics(topics: Mapping[str, str], share: float = HELDOUT_SHARE) -> frozenset[str]:
    """The names of the topics to hold out: whole groups, close to but not above `share` of the text.

    Groups are drawn in the order of the sha256 of their first name, so the choice is the same in every
    process; one too large for what is left of the share is passed over.
    """
    repeated = repeated_topics(topics)
    sizes = {name: 0 if name in repeated else len(text) for name, text in topics.items()}
    room = share * sum(sizes.values())
    chosen: set[str] = set()
    for group in sorted(_groups(topics), key=lambda names: hashlib.sha256(names[0].encode()).digest()):
        size = sum(sizes[name] for name in group)
        if size <= room:
            chosen.update(group)
            room -= size
    return frozenset(chosen)


def repeated_topics(topics: Mapping[str, str]) -> frozenset[str]:
    """The names of topics that lie paragraph for paragraph in another topic that is not itself left out."""
    kept = {name: paragraphs(text) for name, text in topics.items()}
    for name in sorted(topics, key=lambda each: (len(topics[each]), each)):
        if kept[name] and any(kept[name] <= kept[other] for other in kept if other != name):
            del kept[name]
    return frozenset(topics.keys() - kept.keys())


def paragraphs(text: str) -> frozenset[str]:
    """The paragraphs of a topic that can identify it: blanks folded, short ones and headings left out."""
    blocks = re.split(r"\n\s*\n", text)
    folded = (" ".join(block.split()) for block in blocks if not _is_heading(block))
    return frozenset(block for block in folded if len(block) >= _SHARED_PARAGRAPH_CHARS)


def _groups(topics: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The topics joined into groups, transitively, wherever two share a paragraph; each group sorted."""
    group_of = {name: {name} for name in topics}
    owners: dict[str, list[str]] = {}
    for name in sorted(topics):
        for paragraph in paragraphs(topics[name]):
            owners.setdefault(paragraph, []).append(name)
    for first, second in itertools.chain.from_iterable(map(itertools.pairwise, owners.values())):
        if group_of[first] is not group_of[second]:
            merged = group_of[first] | group_of[second]
            group_of.update(dict.fromkeys(merged, merged))
    return sorted({tuple(sorted(group)) for group in group_of.values()})


def _is_heading(block: str) -> bool:
    """Whether a block is a title over its underline, whose character changes with the nesting depth."""
    last_line = block.rstrip().rsplit("\n", 1)[-1]
    return re.fullmatch(r"([*=~\"^-])\1{2,}", last_line.strip()) is not None


@functools.cache
def _topics() -> Mapping[str, str]:
    """All topics of the running Python; imported here because the module behind it is half a megabyte."""
    from pydoc_data.topics import topics

    return dict(topics)
