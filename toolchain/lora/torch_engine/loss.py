"""Cross entropy of a causal model without its logits ever being in memory together.

A row of logits is n_vocab wide, a hidden state n_embd; at a vocabulary of 150,000 the logits of a step would be larger
than the model. Since the output matrix is frozen, the hidden states are all that a gradient must reach: a chunk of
tokens at a time, logits, loss and the gradient of the hidden states are computed at once, and the logits are let go.
Positions from which nothing is learned never meet the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.lora.dataset_file import IGNORED

CHUNK_LOGITS: Final = {"cpu": 1 << 23, "cuda": 1 << 26}
"""So many logits are in memory at once: 32 and 256 MiB of float32, of which a GPU's products need more rows to be fast.
Fewer would have the output matrix unpacked more often."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (n, n_embd) -> logits (n, n_vocab)."""


def summed_loss(
    model: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """The summed cross entropy (nats) over the learned tokens of ``ids`` (rows, n); differentiable, float64.

    ``labels`` and ``positions`` as in ``dataset_file``; without positions each row is one example. The label of the
    first token of a row cannot be predicted and does not count. ``chunk``: logits at once, else CHUNK_LOGITS.
    """
    hidden, head = hidden_states(model, ids, positions)
    wanted = labels[:, 1:]
    learned = wanted != IGNORED
    step = max(1, (chunk or CHUNK_LOGITS[ids.device.type]) // int(model.config.get_text_config().vocab_size))
    loss: torch.Tensor = _ChunkedLoss.apply(hidden[:, :-1][learned], wanted[learned], head, step)
    return loss


def hidden_states(model: Any, ids: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, Head]:
    """What the decoder of ``model`` makes of ``ids`` (rows, n, n_embd), and what makes logits of it.

    Models scale or cap their logits each in its own way (Gemma 2, Granite, Cohere). So the head is the model itself,
    run with a decoder that answers what it is given.
    """
    decoder = model.base_model
    places = {} if positions is None else {"position_ids": positions}
    # with a cache, transformers would not look for packed examples (masking_utils._preprocess_mask_arguments)
    answer = decoder(input_ids=ids, use_cache=False, **places)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        given = type(answer)(**{**answer, "last_hidden_state": hidden[None]})
        decoder.forward = lambda *_, **__: given
        try:
            logits: torch.Tensor = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del decoder.forward
        return logits

    return answer.last_hidden_state, head


def examples_stay_apart(model: Any, tokens: NDArray[np.int32]) -> bool:
    """Whether ``model`` computes two examples packed in one row as it computes them alone; tried on ``tokens`` (n,).

    transformers masks attention by positions that begin again at 0 (masking_utils.find_packed_sequence_indices). A
    convolution or a recurrent state knows nothing of positions, and would carry one example over into the next.
    """
    half = len(tokens) // 2
    ids = torch.as_tensor(tokens, dtype=torch.long, device=model.device)[None]
    places = torch.arange(half, device=ids.device).repeat(1, 2)
    with torch.no_grad():
        packed = hidden_states(model, ids[:, : 2 * half], places)[0][:, half:].float()
        alone = hidden_states(model, ids[:, half : 2 * half], places[:, :half])[0]
    noise = torch.finfo(alone.dtype).eps ** 0.5  # of sums in another order; what is carried over is far above it
    return bool((packed - alone.float()).norm() <= noise * alone.float().norm())


class _ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]
    """Hidden states (n, n_embd) and targets (n,) -> summed loss; keeps the gradient, in the hidden states' dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, step: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden), step):
            some = slice(first, first + step)
            with torch.set_grad_enabled(gradient is not None):
                part = hidden[some].detach().requires_grad_(gradient is not None)
                logits = head(part)
            loss, slope = _cross_entropy(logits.detach(), targets[some])
            total += loss
            if gradient is not None:
                (gradient[some],) = torch.autograd.grad(logits, part, slope)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.item(), None, None, None  # a tensor would be rounded to the gradient's dtype


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss and its gradient by the logits, softmax - 1 at the target, which takes the logits' place.

    torch's own would hold two further tensors of their size. No head needs its result again to go back; one that did
    would make autograd complain of the change.
    """
    values = logits if logits.dtype == torch.float32 else logits.float()
    values -= values.amax(-1, keepdim=True)
    chosen = values.gather(-1, targets[:, None])
    sums = values.exp_().sum(-1, keepdim=True)
    values /= sums
    values.scatter_add_(-1, targets[:, None], torch.full_like(chosen, -1.0))
    return (sums.log() - chosen).sum(), values.to(logits.dtype)
