"""A conversation to tokens, and which of them are learned: exactly what the runtime feeds, and what it should answer.

For each of the assistant's turns the prompt is what the runtime would feed at that point: the model's template over
the messages before it, asked for the next one. What is learned is the rest: the answer with the token that ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from toolchain.base.chat_template import ChatTemplate, Message
from toolchain.base.errors import ArtifactError
from toolchain.lora.data.problems import shown
from toolchain.lora.data.vocabulary import Vocabulary

_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"
_TAIL: Final = 4  # tokens: a template adds a line break behind an end of turn, or two
_MARK: Final = "ANSWER\u2063MARK"  # with an invisible separator: no template has it


@dataclass(kw_only=True)
class Example:
    """``learned`` has a byte for each of ``ids``, 1 where it counts; ``length`` tells more where an end is missing."""

    ids: list[int]
    learned: bytearray
    length: int = 0


class UnrenderableError(Exception):
    """The template's own words about a conversation that it does not take."""


def render(
    messages: Sequence[Message],
    template: ChatTemplate,
    vocabulary: Vocabulary,
    *,
    n_ctx: int,
    learn_prompts: bool = False,
) -> list[Example]:
    """The examples that ``messages`` make, in order.

    One, as long as the runtime's tokens of each prompt begin with those of the turns before it. Where they do not
    (templates that leave out earlier thoughts, tokens across the end of a turn), a turn begins an example of its own.
    What lies beyond ``n_ctx`` tokens may be missing; ``length`` tells how long it would have been.
    """
    try:
        if any(message["role"] == "tool" for message in messages) and "tool" not in (template.source or ""):
            raise UnrenderableError("the model's template takes no turns of a tool")
        if learn_prompts:
            return [_whole(messages, template, vocabulary)]
        return _by_turn(messages, template, vocabulary, n_ctx)
    except ArtifactError as error:
        raise UnrenderableError(f"{error.message}: {error.evidence}") from error


def _whole(messages: Sequence[Message], template: ChatTemplate, vocabulary: Vocabulary) -> Example:
    ids = vocabulary.tokens(template.render(messages, ask=False))
    example = Example(ids=ids, learned=bytearray(b"\1" * len(ids)))
    if messages[-1]["role"] == "assistant" and not any(map(vocabulary.ends_reply, ids[-_TAIL:])):
        _end(example, vocabulary)
    return example


def _by_turn(messages: Sequence[Message], template: ChatTemplate, vocabulary: Vocabulary, n_ctx: int) -> list[Example]:
    examples: list[Example] = []
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place in turns:
        prompt, answer = _turn(messages[:place], messages[place], template, vocabulary)
        if examples and prompt[: len(examples[-1].ids)] == examples[-1].ids:
            example = examples[-1]
        else:
            example = Example(ids=[], learned=bytearray())
            examples.append(example)
        ended = max((i for i, token in enumerate(answer, 1) if vocabulary.ends_reply(token)), default=len(answer))
        example.learned += bytes(len(prompt) - len(example.ids)) + b"\1" * ended + bytes(len(answer) - ended)
        example.ids = prompt + answer
        if len(prompt) >= n_ctx and place != turns[-1]:  # all later prompts are longer still
            example.length = len(vocabulary.tokens(template.render(messages[: turns[-1] + 1], ask=False)))
            break
    for example in examples:
        kept = example.learned.rfind(1) + 1  # without what the template adds behind the end of the last answer
        del example.ids[kept:], example.learned[kept:]
        if not vocabulary.ends_reply(example.ids[-1]):
            _end(example, vocabulary)
        example.length = max(example.length, len(example.ids))
    return examples


def _turn(
    before: Sequence[Message], said: Message, template: ChatTemplate, vocabulary: Vocabulary
) -> tuple[list[int], list[int]]:
    """(tokens of the prompt as the runtime feeds them, tokens of the answer as they follow)."""
    asked = template.render(before, ask=True)
    told = template.render([*before, said], ask=False)
    answer = told[len(asked) :] if told.startswith(asked) else _behind_thought(asked, before, said, template)
    if not answer:
        raise ArtifactError("the template leaves the answer out", evidence=f"the prompt ends with {shown(asked[-50:])}")
    prompt, whole = vocabulary.tokens(asked), vocabulary.tokens(asked + answer)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    return prompt, vocabulary.continued(answer.encode()).tolist()


def _behind_thought(asked: str, before: Sequence[Message], said: Message, template: ChatTemplate) -> str:
    """The answer that goes on from ``asked`` where the template tells it otherwise afterwards.

    Some templates' prompts open a thought for the model, or close an empty one, and leave it out of the conversation as
    it is told later; some have the system's words before the last question only. The answer then stands as it is told,
    behind the thought that the data has, or an empty one.
    """
    thought, _, words = said["content"].rpartition(_CLOSE)
    told = template.render([*before, {**said, "content": said["content"].removesuffix(words) + _MARK}], ask=False)
    lead, found, ending = told.rpartition(_MARK)
    closing = f"\n{_CLOSE}\n\n"
    if lead.rstrip().endswith(_CLOSE):
        lead, _, space = lead.rpartition(_CLOSE)
        closing = _CLOSE + space
        opened = lead.rfind(_OPEN)
        lead = lead[:opened] if opened > lead.rfind(_CLOSE) else lead
    question = before[-1]["content"].strip() if before else ""
    same_place = asked.startswith(lead.rstrip()) or (question and lead.endswith(asked[asked.rfind(question) :]))
    if not found or not same_place:
        raise ArtifactError(
            "the template's prompt is not what it tells before an answer",
            evidence=f"the prompt ends with {shown(asked[-50:])}, before the answer stands {shown(lead[-50:])}",
        )
    if asked.rstrip().endswith(_OPEN):
        return thought.strip().removeprefix(_OPEN).strip() + closing + words.strip() + ending
    return words.strip() + ending


def _end(example: Example, vocabulary: Vocabulary) -> None:
    """The model's own end of a text behind the last answer, where the template has no token that ends it."""
    if vocabulary.end is not None:
        example.ids.append(vocabulary.end)
        example.learned.append(1)
