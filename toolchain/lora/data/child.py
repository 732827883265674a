"""``python -m toolchain.lora.data.child FOLDER/request.json``: makes the dataset in FOLDER, beside llama_cpp.

Progress goes to stdout as ``[done/total]``, KiB of input; a failure to ``failure.json`` and the exit status.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from toolchain.base import files
from toolchain.base.chat_template import ChatTemplate, chat_template
from toolchain.base.errors import FoundryError, UsageError
from toolchain.base.gguf import read_header
from toolchain.lora.child_errors import write_failure
from toolchain.lora.data.pack import Examples
from toolchain.lora.data.prepare import DATASET, FACTS, HELD_TEXT, TRAIN_TEXT, DataFacts, DataRequest
from toolchain.lora.data.problems import Problems, shown
from toolchain.lora.data.records import Conversation, DataFile, conversations, read_text
from toolchain.lora.data.render import UnrenderableError, render
from toolchain.lora.data.split import content_key, held_keys, split_text
from toolchain.lora.data.vocabulary import PIECE_BYTES, Vocabulary, import_library, library_logits, open_vocabulary
from toolchain.lora.dataset_file import PROBE_TOKENS, Dataset, write_dataset

_BLOCK_BYTES: Final = 1 << 20
_WORDS_CHARS: Final = 300
_PLAIN: Final = ChatTemplate(source=None, bos_token="", eos_token="")


def main(request_path: Path) -> int:
    folder = request_path.parent
    try:
        with files.disk_errors(folder):
            request = DataRequest.from_json(json.loads(request_path.read_text()))
            facts = _prepare(request, folder)
            files.write_json(folder / FACTS, asdict(facts))
    except FoundryError as error:
        return write_failure(folder, error)
    return 0


def _prepare(request: DataRequest, folder: Path) -> DataFacts:
    template = chat_template(read_header(Path(request.base)))
    lib = import_library()
    with (
        open_vocabulary(lib, Path(request.base)) as vocabulary,
        (folder / TRAIN_TEXT).open("w+b") as train_text,
        (folder / HELD_TEXT).open("w+b") as held_text,
    ):
        train, held = _Part(Examples(request.n_ctx), train_text), _Part(Examples(request.n_ctx), held_text)
        work = _Work(request, template, vocabulary)
        work.fill(train, held)
    _require(request, train.examples, held.examples)
    train_rows = train.examples.rows(packing=request.packing, seed=request.seed)
    held_rows = held.examples.rows(packing=request.packing, seed=request.seed)
    probe_ids = train.examples.beginning(PROBE_TOKENS)
    probe = library_logits(lib, Path(request.base), probe_ids.tolist(), request.n_threads)
    write_dataset(folder / DATASET, Dataset(train=train_rows, held=held_rows, probe_ids=probe_ids, probe_logits=probe))
    return DataFacts(
        examples=train.examples.count,
        tokens=train.examples.tokens,
        learned_tokens=train_rows.learned,
        rows=len(train_rows.ids),
        cut=train.examples.cut,
        dropped=train.examples.dropped,
        longest=max(train.examples.longest, held.examples.longest),
        leaked=work.leaked,
        padding=1 - train.examples.tokens / train_rows.ids.size,
        held_examples=held.examples.count,
        held_tokens=held.examples.tokens,
        held_learned_tokens=held_rows.learned,
        held_rows=len(held_rows.ids),
        held_cut=held.examples.cut,
        held_dropped=held.examples.dropped,
        has_template=template.source is not None,
        inputs={file.path: files.sha256_file(Path(file.path)) for file in request.files},
    )


@dataclass(frozen=True)
class _Part:
    """What is learned or what is held out: its examples, and the same as text.

    llama-perplexity and the trainer of 2023 read special tokens as plain characters (``common_tokenize`` in
    tools/perplexity/perplexity.cpp, ``tokenize_file`` in common/train.cpp of its tree), so that a conversation stands
    in the text as plain dialogue. A file that repeats is there as a whole, and as a whole again.
    """

    examples: Examples
    text: BinaryIO

    def append_again(self, start: int, times: int) -> None:
        """What was written from ``start`` on, ``times`` more."""
        end = self.text.tell()
        for _ in range(times):
            for at in range(start, end, _BLOCK_BYTES):
                self.text.seek(at)
                block = self.text.read(min(_BLOCK_BYTES, end - at))
                self.text.seek(0, os.SEEK_END)
                self.text.write(block)


class _Work:
    """The files on their way into the two parts. ``leaked`` examples of theirs stand in the held-out file too."""

    def __init__(self, request: DataRequest, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self.request, self.template, self.vocabulary = request, template, vocabulary
        self.problems = Problems()
        self.leaked = 0
        self._total = sum(Path(file.path).stat().st_size for file in request.files)
        self._done = self._told = 0

    def fill(self, train: _Part, held: _Part) -> None:
        """UsageError with all conversations that the template does not take."""
        request, kept_file = self.request, self.request.held_out_file
        talks = [file for file in request.sources if file.kind != "text"]
        if any(file.kind != "text" for file in request.files):
            self.template.render([{"role": "user", "content": "?"}])  # broken for all, it is no line's fault
        if kept_file:
            keys = frozenset(self._keys([kept_file])) if kept_file.kind != "text" else frozenset[bytes]()
        else:
            keys = held_keys(self._keys(talks) if request.held_out else (), request.held_out, request.seed)
        kept_text = read_text(kept_file).strip() if kept_file and kept_file.kind == "text" else b""
        for file in request.sources:
            if kept_text and file.kind == "text" and kept_text in read_text(file):
                raise _held_is_learned(file, request)
            start = train.text.tell()
            if file.kind == "text":
                self._text(file, train, held, share=0.0 if kept_file else request.held_out)
            else:
                self._talks(file, train, held, keys)
            train.append_again(start, file.repeat - 1)
        if kept_file and kept_file.kind == "text":
            self._text(kept_file, held, held, share=0.0)
        elif kept_file:
            self._talks(kept_file, held, held, frozenset())
        self.problems.settle()

    def _keys(self, talks: Sequence[DataFile]) -> Iterator[bytes]:
        for file in talks:
            for conversation in conversations(file, self.problems):
                yield content_key(conversation.messages)

    def _text(self, file: DataFile, train: _Part, held: _Part, *, share: float) -> None:
        data = read_text(file)
        for part, spans in zip((train, held), split_text(data, share, self.request.seed), strict=True):
            repeat = file.repeat if part is train else 1
            for start, end in spans:
                found = []
                for tokens in self.vocabulary.document(data, (start, end)):
                    found.append(tokens)
                    self._tell(min(PIECE_BYTES, end - start))
                part.examples.add_windows(np.concatenate(found), repeat=repeat)
                part.text.write(data[start:end])
                if not data[start:end].endswith(b"\n"):
                    part.text.write(b"\n")

    def _talks(self, file: DataFile, train: _Part, held: _Part, keys: frozenset[bytes]) -> None:
        for conversation in conversations(file, self.problems):
            kept = bool(keys) and content_key(conversation.messages) in keys
            if kept and self.request.held_out_file:
                self.leaked += file.repeat
                continue
            self._talk(file, conversation, held if kept else train, repeat=1 if kept else file.repeat)

    def _talk(self, file: DataFile, conversation: Conversation, part: _Part, *, repeat: int) -> None:
        messages = conversation.messages
        try:
            examples = render(
                messages,
                self.template,
                self.vocabulary,
                n_ctx=self.request.n_ctx,
                learn_prompts=self.request.learn_prompts,
            )
        except UnrenderableError as error:
            self.problems.add(Path(file.path), conversation.line, shown(str(error), _WORDS_CHARS))
            return
        for example in examples:
            part.examples.add(example.ids, bytes(example.learned), repeat=repeat, length=example.length)
        part.text.write(_PLAIN.render(messages, ask=False).encode() + b"\n")
        self._tell(sum(len(message["content"]) for message in messages))

    def _tell(self, more: int) -> None:
        """So many bytes of the files are done, about."""
        self._done = min(self._done + more, self._total)
        if self._done - self._told >= _BLOCK_BYTES:
            self._told = self._done
            sys.stdout.write(f"[{self._done >> 10}/{self._total >> 10}]\n")
            sys.stdout.flush()


def _held_is_learned(file: DataFile, request: DataRequest) -> UsageError:
    held = request.held_out_file.path if request.held_out_file else ""
    return UsageError(
        f"the held-out text stands in what is learned: {file.path}",
        evidence=f"held_out_file: {held}",
        hint="a result is judged by what was not learned: take it out, or write `held_out: 0.1` in place of the file",
    )


def _require(request: DataRequest, train: Examples, held: Examples) -> None:
    for part, name in ((train, "learn"), (held, "judge the result by")):
        wanted = part is train or request.held_out or request.held_out_file
        if len(part) or not wanted:
            continue
        if part.dropped:
            raise UsageError(
                f"no example leaves anything to {name} within n_ctx",
                evidence=f"{part.dropped} examples, the longest of {part.longest} tokens; n_ctx is {request.n_ctx}",
                hint=f"`n_ctx: {-(-part.longest // 64) * 64}` in the recipe's train part takes all, or shorten them",
            )
        raise UsageError(
            f"there is too little data to {name}",
            evidence=f"{train.count} examples to learn, {held.count} held out",
            hint="add examples" + ("" if part is train else ", or write `held_out: 0`: nothing is evaluated then"),
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
