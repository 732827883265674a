"""Makes the demo model: a small real Llama, trained here from the text that CPython carries.

Run as a child: `python -m toolchain.stages.demo_model --out DIR [--preset tiny] [--seed 0] [--steps N]
[--threads N]`. The result is an ordinary Hugging Face directory, so everything downstream (converter,
quantizer, evaluation, runtime) meets what it would meet in a downloaded model.

Stdout carries one line a step, `[n/total] loss 4.321`; all else goes to stderr. DIR gets its files only
after the last step. Exit status: 0 done, 2 usage, 3 a package is missing or DIR cannot be written,
6 training diverged. Same seed, threads, packages and machine: same bytes.

Importing this module costs nothing: torch and its kin are imported by the functions that use them.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.stages.corpus import corpus_digest, python_docs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class DemoPreset:
    """The shape of a demo model and how it is trained; widths are multiples of 256, the K-quants' block."""

    name: str
    kv_heads: int
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    intermediate: int = 768
    vocab: int = 4096
    steps: int = 400
    batch: int = 4
    seq_len: int = 256
    peak_lr: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    # EXPERIMENT
    opt: str = "adamw"
    muon_lr: float = 0.02
    ns: int = 5
    chat: bool = True
    b2: float = 0.95
    emb_std: float = 0.02
    sched: str = "cosine"


PRESETS: dict[str, DemoPreset] = {
    preset.name: preset
    for preset in (
        DemoPreset(name="tiny", kv_heads=4),
        DemoPreset(name="tiny-mha", kv_heads=8),
    )
}


class TrainingDivergedError(Exception):
    """The loss is no longer a number; nothing was written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, make the model, and return the exit status that the module docstring lists."""
    args = _parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        make_demo_model(
            PRESETS[args.preset],
            args.out,
            seed=args.seed,
            steps=args.steps,
            threads=args.threads,
            on_step=lambda step, total, loss: print(f"[{step}/{total}] loss {loss:.3f}", flush=True),
        )
    except ImportError as error:
        print(f"demo model: {error}. It needs torch, transformers and sentencepiece.", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"demo model: cannot write {args.out}: {error}", file=sys.stderr)
        return 3
    except TrainingDivergedError as error:
        print(f"demo model: {error}", file=sys.stderr)
        return 6
    return 0


def n_params(preset: DemoPreset) -> int:
    """The exact number of weights: two embeddings, and per layer attention, gated MLP and two norms."""
    width, kv_width = preset.hidden_size, preset.hidden_size * preset.kv_heads // preset.heads
    attention = 2 * width * width + 2 * width * kv_width
    layer = attention + 3 * width * preset.intermediate + 2 * width
    return 2 * preset.vocab * width + preset.layers * layer + width


def demo_bytes(preset: DemoPreset) -> int:
    """About what the directory takes on disk: float32 weights, 16 bytes a piece and 16 KiB of text files."""
    return 4 * n_params(preset) + 16 * preset.vocab + 16 * 1024


def make_demo_model(
    preset: DemoPreset,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    threads: int = 2,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> None:
    """Train tokenizer and weights, then fill the existing directory `out`."""
    import torch
    from sentencepiece import SentencePieceProcessor

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)

    text = python_docs("train")
    tokenizer_model = train_tokenizer(text, preset.vocab)
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_model)
    tokens = torch.tensor(tokenizer.encode(text) + (encode_chats(tokenizer, text) if preset.chat else []))

    model = new_model(preset)
    total = preset.steps if steps is None else steps
    for step, loss in enumerate(train(model, tokens, preset, total), start=1):
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"loss is {loss} at step {step} of {total}; try another --seed")
        on_step(step, total, loss)

    card = _model_card(preset, seed=seed, steps=total)
    save(model, tokenizer_model, card, out)


def train_tokenizer(text: str, vocab: int) -> bytes:
    """A SentencePiece BPE model in Llama's manner: bytes as fallback, digits apart, no normalization."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def encode_chats(tokenizer: Any, text: str) -> list[int]:
    """Every section that opens with a paragraph, as one chat: its heading asks, the paragraph answers."""
    sections = re.findall(r"^(\S.*)\n([*=~\"^-])\2{2,}\n\n((?:\S.*\n)+)", text, flags=re.MULTILINE)
    tokens: list[int] = []
    for heading, _, paragraph in sections:
        tokens += [BOS_ID, *tokenizer.encode(f"<|user|>\n{heading}"), EOS_ID]
        tokens += [*tokenizer.encode(f"\n<|assistant|>\n{paragraph.strip()}"), EOS_ID]
    return tokens


def new_model(preset: DemoPreset) -> LlamaForCausalLM:
    """The untrained model, initialized from torch's current seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        max_position_embeddings=preset.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) == n_params(preset)
    return model


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, preset: DemoPreset, steps: int
) -> Iterator[float]:
    """Train in place and yield each step's loss (nats a token)."""
    import torch
    from torch.nn.functional import cross_entropy

    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "layers" in n]
    embeddings = [w for n, w in model.named_parameters() if w.ndim == 2 and "layers" not in n]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizers = []
    wd = preset.weight_decay
    if preset.opt == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=preset.muon_lr, weight_decay=wd, ns_steps=preset.ns))
        groups = [{"params": embeddings, "weight_decay": wd}, {"params": norms, "weight_decay": 0.0}]
    else:
        groups = [{"params": matrices + embeddings, "weight_decay": wd}, {"params": norms, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=preset.peak_lr, betas=(0.9, preset.b2), fused=True))
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    model.train()
    for step, windows in zip(range(steps), batches(tokens, preset), strict=False):
        f = learning_rate(preset, step, steps)
        for o, b in zip(optimizers, base):
            for g, lr in zip(o.param_groups, b):
                g["lr"] = lr * f
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        yield loss.item()


def batches(tokens: torch.Tensor, preset: DemoPreset) -> Iterator[torch.Tensor]:
    """Endless batches of (batch, seq_len + 1) token ids, each row BOS and a stretch of the text.

    Every epoch cuts the text into stretches at a new offset and shuffles them.
    """
    import torch

    while True:
        offset = int(torch.randint(preset.seq_len, ()))
        rows = tokens[offset : offset + (len(tokens) - offset) // preset.seq_len * preset.seq_len]
        rows = rows.view(-1, preset.seq_len)
        rows = torch.cat([torch.full((len(rows), 1), BOS_ID), rows], dim=1)
        yield from rows[torch.randperm(len(rows))].split(preset.batch)


def learning_rate(preset: DemoPreset, step: int, steps: int) -> float:
    if step < preset.warmup_steps:
        return (step + 1) / preset.warmup_steps
    x = (step - preset.warmup_steps) / max(1, steps - preset.warmup_steps)
    if preset.sched == "cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    return 1 - x


def save(model: LlamaForCausalLM, tokenizer_model: bytes, card: str, out: Path) -> None:
    """Write the files of a Hugging Face model directory."""
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
    model.save_pretrained(out)
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
        **special,
    }
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "README.md").write_text(card, encoding="utf-8")


def _model_card(preset: DemoPreset, *, seed: int, steps: int) -> str:
    return "x"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m toolchain.stages.demo_model", description="Make the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="an empty or missing directory")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the preset's own number")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
