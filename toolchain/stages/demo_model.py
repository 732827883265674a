"""Makes the demo model: a small real Llama, trained here from the text that CPython carries.

The result is an ordinary Hugging Face directory: converter, quantizer, evaluation and runtime meet in it
what they would meet in a downloaded model. Same seed, threads, packages and machine: same bytes.

Run as a child, `python -m toolchain.stages.demo_model --out DIR`. Stdout carries one line a step,
`[n/total] loss 4.321`; all else goes to stderr. DIR gets its files only after the last step. Exit status:
0 done, 2 usage, 3 a package, disk space or the right to write is missing, 6 training diverged. Importing
this module costs nothing: torch and its kin are imported by the functions that use them.
"""

# ruff: noqa: T201  (a child: its stdout is its protocol)

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.stages.corpus import corpus_digest, python_docs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

BOS_ID, EOS_ID = 1, 2
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# Roles are plain text, not pieces of their own: every tokenizer then agrees on them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_SECTION = re.compile(r"^(\S.*)\n([*=~\"^-])\2{2,}\n\n((?:\S.*\n)+)", flags=re.MULTILINE)


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
    context: int = 512  # declared; trained on seq_len, it still does well at twice that
    steps: int = 400
    batch: int = 4
    seq_len: int = 256
    warmup_steps: int = 40
    muon_lr: float = 0.015
    adamw_lr: float = 0.01
    weight_decay: float = 0.8


PRESETS: dict[str, DemoPreset] = {
    "tiny": DemoPreset(name="tiny", kv_heads=4),
    "tiny-mha": DemoPreset(name="tiny-mha", kv_heads=8),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, make the model, and return the exit status that the module docstring lists."""
    args = _parser().parse_args(argv)
    preset: DemoPreset = PRESETS[args.preset]
    steps: int = preset.steps if args.steps is None else args.steps
    if min(steps, args.threads) < 1:
        return _failure(2, "--steps and --threads must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if any(args.out.iterdir()):
            return _failure(2, f"{args.out} is not empty; name a fresh directory with --out")
        if (free_bytes := shutil.disk_usage(args.out).free) < demo_bytes(preset):
            raise OSError(f"{free_bytes:,} bytes are free and it takes {demo_bytes(preset):,}")
        for step, loss in make_demo_model(preset, args.out, seed=args.seed, steps=steps, threads=args.threads):
            print(f"[{step}/{steps}] loss {loss:.3f}", flush=True)
    except ImportError as error:
        return _failure(3, f"{error}; it needs torch, transformers, safetensors and sentencepiece")
    except OSError as error:
        return _failure(3, f"cannot write {args.out}: {error}")
    except FloatingPointError as error:
        return _failure(6, str(error))
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
    preset: DemoPreset, out: Path, *, seed: int, steps: int, threads: int
) -> Iterator[tuple[int, float]]:
    """Yield (step, loss) while training, then fill the directory `out`; FloatingPointError if training diverges."""
    # libgomp reads this when torch loads it. By default waiting threads spin: beside other work, 4 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    import torch
    from sentencepiece import SentencePieceProcessor

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    text = python_docs("train")
    tokenizer_model = train_tokenizer(text, preset.vocab)
    tokenizer = SentencePieceProcessor(model_proto=tokenizer_model)
    tokens = torch.tensor(tokenizer.encode(text) + encode_chats(tokenizer, text))
    model = new_model(preset)
    for step, loss in enumerate(train(model, tokens, preset, steps), start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step} of {steps}; try another --seed")
        yield step, loss
    save(model, tokenizer_model, model_card(preset, seed=seed, steps=steps, threads=threads), out)


def train_tokenizer(text: str, vocab: int) -> bytes:
    """A SentencePiece BPE model like Llama's, but with no space put before the text or after a special token."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return model.getvalue()


def encode_chats(tokenizer: Any, text: str) -> list[int]:
    """Every section that opens with a paragraph, as one chat: its heading asks, the paragraph answers."""
    tokens: list[int] = []
    for heading, _, paragraph in _SECTION.findall(text):
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
        max_position_embeddings=preset.context,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, preset: DemoPreset, steps: int) -> Iterator[float]:
    """Train in place and yield each step's loss, in nats a token.

    Muon (Keller Jordan, 2024) moves the matrices inside the layers, AdamW the embeddings and norms. AdamW alone
    (3e-3, weight decay 0.1) reached perplexity 117 held out where this reaches 76. torch's own Muon multiplies in
    bfloat16, where processors without such instructions take ten seconds a step.
    """
    import torch

    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    momenta = [torch.zeros_like(weight) for weight in matrices]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    embeddings = [model.model.embed_tokens.weight, model.lm_head.weight]
    groups = [{"params": embeddings}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=preset.weight_decay)
    model.train()
    for step, windows in zip(range(steps), batches(tokens, preset), strict=False):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(embeddings + norms, 1.0)
        share = learning_rate_share(step, steps, preset.warmup_steps)
        for group in adamw.param_groups:
            group["lr"] = share * preset.adamw_lr
        adamw.step()
        lr = share * preset.muon_lr
        with torch.no_grad():
            for weight, momentum in zip(matrices, momenta, strict=True):
                momentum.lerp_(weight.grad, 0.05)
                direction = orthogonalized(weight.grad.lerp(momentum, 0.95))
                weight.mul_(1 - lr * preset.weight_decay)
                weight.add_(direction, alpha=-lr * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1])))
        yield loss.item()


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values nearer one: three Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = x.addmm(gram.addmm(gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def batches(tokens: torch.Tensor, preset: DemoPreset) -> Iterator[torch.Tensor]:
    """Endless (rows, 1 + seq_len) token ids, BOS and a stretch of the text; each epoch cuts and shuffles anew."""
    import torch

    while True:
        stretches = tokens[int(torch.randint(preset.seq_len, ())) :].split(preset.seq_len)[:-1]
        rows = torch.nn.functional.pad(torch.stack(stretches), (1, 0), value=BOS_ID)
        yield from rows[torch.randperm(len(rows))].split(preset.batch)


def learning_rate_share(step: int, steps: int, warmup_steps: int) -> float:
    """What part of the peak learning rate a step uses: a linear rise, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))


def save(model: LlamaForCausalLM, tokenizer_model: bytes, card: str, out: Path) -> None:
    """Write the files of a Hugging Face model directory."""
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves its private temporary file's 0600
    tokenizer_config = SPECIAL_TOKENS | {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS, indent=2) + "\n")
    (out / "README.md").write_text(card, encoding="utf-8")


def model_card(preset: DemoPreset, *, seed: int, steps: int, threads: int) -> str:
    """README.md: what the model is, what it was made from, and how to make it again."""
    return f"""---
language: en
license: other
---

# Demo model `{preset.name}`

A Llama of {n_params(preset):,} parameters for exercising conversion, quantization, evaluation and inference in
minutes. It writes what looks like English and knows nothing. Made by llama-foundry from the language reference
in CPython {platform.python_version()} (`pydoc_data.topics`, PSF licence; sha256 `{corpus_digest("train")}`),
less the tenth that is held out for evaluation:

    python -m toolchain.stages.demo_model --preset {preset.name} --seed {seed} --steps {steps} --threads {threads}
"""


def _failure(status: int, message: str) -> int:
    print(f"demo model: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toolchain.stages.demo_model", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty or missing directory")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the preset's")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
