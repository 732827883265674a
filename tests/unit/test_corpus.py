"""The demo corpus: its split neither leaks nor loses text, and is the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from toolchain.stages.corpus import (
    Split,
    corpus_digest,
    heldout_topics,
    paragraphs,
    python_docs,
    repeated_topics,
    topic_names,
)

ROOT = Path(__file__).resolve().parents[2]
LONG = "a paragraph long enough to say which of the topics it was copied from, number "


def test_every_topic_is_in_exactly_one_part() -> None:
    assert sorted(topic_names("train") + topic_names("heldout")) == sorted(topics)


def test_no_paragraph_is_in_both_parts() -> None:
    train, heldout = (paragraphs(python_docs(split)) for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout


def test_no_paragraph_is_lost_with_the_repeated_topics() -> None:
    kept = paragraphs(python_docs("train")) | paragraphs(python_docs("heldout"))
    assert frozenset().union(*map(paragraphs, topics.values())) <= kept


def test_a_topic_is_printed_as_pydoc_has_it() -> None:
    assert topics["string-methods"].strip() in python_docs("train") + python_docs("heldout")


def test_heldout_is_about_a_tenth_and_enough_to_score() -> None:
    train, heldout = len(python_docs("train")), len(python_docs("heldout"))
    assert 0.08 < heldout / (train + heldout) < 0.11
    # At most 3.7 characters a token, so at least 37 chunks of 256 tokens.
    assert heldout > 35_000


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_digest_is_the_same_whatever_the_hash_seed(split: Split) -> None:
    script = f"from toolchain.stages.corpus import corpus_digest; print(corpus_digest({split!r}))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {corpus_digest(split)}


def test_a_topic_inside_another_goes_where_the_other_goes() -> None:
    inner = LONG + "1"
    world = {f"other{n}": LONG + f"of {n}" for n in range(2, 30)}
    for share in (0.1, 0.5, 0.9):
        chosen = heldout_topics({"outer": f"{inner}\n\n{LONG}0", "inner": inner, **world}, share)
        assert ("outer" in chosen) == ("inner" in chosen)


def test_of_two_equal_topics_one_is_kept() -> None:
    assert repeated_topics({"if": LONG, "else": LONG, "for": LONG + "3"}) == {"else"}


def test_a_topic_without_long_paragraphs_is_never_called_a_repeat() -> None:
    assert repeated_topics({"short": "See also: x.", "long": LONG}) == frozenset()


def test_headings_at_different_depths_hide_no_shared_paragraph() -> None:
    title = "A heading that is long enough to be taken for a paragraph of its own"
    nested, top = (f"{title}\n{mark * len(title)}\n\n{LONG}" for mark in "=*")
    assert paragraphs(nested) == paragraphs(top) == {LONG.strip()}
