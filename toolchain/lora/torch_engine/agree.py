"""Whether transformers computes the same function as the library that will run the adapter.

A rotary embedding read wrongly or a lost norm trains just as smoothly, and towards an adapter that is worthless where
it is used. So the library's own logits, of a few tokens, are held against ours before anything is learned.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.base.errors import ArtifactError
from toolchain.lora.torch_engine.loss import hidden_states

MAX_MEAN_KLD: Final = 0.01
"""What lies between noise and fault, nats a token.

Noise: the library multiplies quantized weights with activations that it quantizes too (Q8_K, Q8_0). On thirteen
families of random weights, 2 layers, in F16, Q8_0, Q4_K_M, IQ4_XS and Q2_K, and on the demo model, 4 layers, it was
3e-10 to 2.6e-4 against float32, at most 3.3e-4 against bfloat16; it adds up over layers, to some 4e-3 at 80. Faults:
halved rotary frequencies, a norm left out, the rows of all queries and keys in another order gave 0.025 to 0.18 on the
demo model, whatever its type.
"""


def mean_divergence(model: Any, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence (nats a token) of the model's predictions on ``ids`` (n,) from the library's
    ``logits`` (n, n_vocab), by the path that the training's loss takes; NaN where either has no finite logits.
    """
    tokens = torch.as_tensor(ids, dtype=torch.long, device=model.device)[None]
    with torch.no_grad():
        hidden, head = hidden_states(model, tokens, None)
        ours = head(hidden[0]).double().cpu().log_softmax(-1)
    theirs = torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def require_agreement(model: Any, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> None:
    """Raise ArtifactError where the two differ by more than MAX_MEAN_KLD."""
    n_vocab = int(model.get_output_embeddings().out_features)
    if logits.shape[1] != n_vocab:
        raise ArtifactError(
            "transformers and the library read different vocabularies out of this model",
            evidence=f"transformers: {n_vocab} tokens, the library: {logits.shape[1]}",
        )
    found = mean_divergence(model, ids, logits)
    if not found <= MAX_MEAN_KLD:
        raise ArtifactError(
            "transformers computes this model differently than the library does; an adapter would not fit it",
            evidence=f"mean KL divergence over {len(ids)} tokens: {found:.4g}, the bound is {MAX_MEAN_KLD:g}",
            hint="report it with the model's name; `engine: ggml` does not use transformers",
        )
