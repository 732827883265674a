"""Run as a program with a request's path: the transformers side of ``peft_form``, in the request's folder.

``from``: a PEFT folder -> ``base/config.json`` of the model and ``peft/``, the adapter as the converter reads it: one
alpha for all, every other scale brought into B. ``to``: a GGUF adapter -> ``peft/``.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from toolchain.base.errors import ArtifactError, FoundryError, UsageError
from toolchain.base.gguf import read_header
from toolchain.lora.child_errors import write_failure
from toolchain.lora.forms.adapter import EMBEDDING, Pair, read_adapter
from toolchain.lora.forms.peft_form import CONFIG, WEIGHTS
from toolchain.lora.torch_engine.architecture import find_architecture, model_config
from toolchain.lora.torch_engine.names import Converted, tensor_names
from toolchain.lora.torch_engine.weights_file import WeightsFile

_PREFIX: Final = "base_model.model."
_HALVES: Final[Mapping[str, str]] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
_TEXT_PART: Final = "language_model."
"""What the modules of a text model are called by where it was trained as part of one that sees."""


class _Base:
    """The transformers model of a GGUF, without its numbers."""

    def __init__(self, path: Path) -> None:
        self.file = WeightsFile(read_header(path).shard_paths)
        architecture = find_architecture(self.file.first)
        self.config = model_config(self.file)
        with init_empty_weights():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        self.names = tensor_names(self.model, self.file)
        self._converted = Converted(architecture, self.config.to_dict())

    def row_order(self, tensor: str, n_rows: int) -> Any:
        """Where row i of the parameter is found in the tensor; None where all are in their place."""
        return self._converted.row_order(tensor, n_rows)


def main(request: Path) -> int:
    asked = json.loads(request.read_text())
    try:
        base = _Base(Path(asked["base"]))
        if asked["do"] == "from":
            _from_peft(Path(asked["folder"]), base, request.parent)
        else:
            _to_peft(Path(asked["adapter"]), base, request.parent / "peft")
    except FoundryError as error:
        return write_failure(request.parent, error)
    return 0


def _from_peft(folder: Path, base: _Base, room: Path) -> None:
    config = LoraConfig.from_pretrained(str(folder))
    tensors = _read_tensors(folder)
    halves = _halves(folder, tensors, base)
    counts = {module: _scale(config, module, len(tensors[a])) * len(tensors[a]) for module, (a, _) in halves.items()}
    alpha = Counter(counts.values()).most_common(1)[0][0]
    for module, (_, b) in halves.items():
        if counts[module] != alpha:
            tensors[b] = (tensors[b].double() * (counts[module] / alpha)).float()
    (room / "peft").mkdir()
    save_file(tensors, room / "peft" / WEIGHTS)
    (room / "peft" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
    (room / "base").mkdir()
    plain = base.config.to_dict() | {"architectures": [type(base.model).__name__]}
    (room / "base" / "config.json").write_text(json.dumps(plain))


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{folder / WEIGHTS} is not a whole safetensors file", evidence=str(error), hint="copy it again"
        ) from error
    return tensors


def _halves(folder: Path, tensors: Mapping[str, torch.Tensor], base: _Base) -> dict[str, tuple[str, str]]:
    """The names of A and B by module; UsageError for whatever else there is, ArtifactError for what does not fit."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        suffix = next((suffix for suffix in _HALVES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(_PREFIX):
            raise UsageError(
                f"{folder.name} holds {name}, which is no half of a pair of matrices",
                hint="merge it with peft (merge_and_unload), and convert the whole model with `./inv quantize`",
            )
        module = name.removeprefix(_PREFIX).removesuffix(suffix)
        found.setdefault(module, {})[_HALVES[suffix]] = name
    if not found:
        raise ArtifactError(f"{folder.name} holds no matrices", hint="train it again, or copy it again")
    for module, names in found.items():
        if names.keys() != {"A", "B"}:
            raise ArtifactError(f"{folder.name}: of the pair for {module} one half is missing", hint="copy it again")
        _check_fit(folder, module, tensors[names["A"]], tensors[names["B"]], base)
    return {module: (names["A"], names["B"]) for module, names in found.items()}


def _check_fit(folder: Path, module: str, a: torch.Tensor, b: torch.Tensor, base: _Base) -> None:
    parameter = f"{module.replace(_TEXT_PART, '')}.weight"
    tensor = base.names.get(parameter)
    of_base = base.file.first.path.name
    if tensor is None:
        raise ArtifactError(
            f"{folder.name} changes {module}, which {of_base} does not have",
            hint="give the GGUF of the model that it was trained on",
        )
    if tensor == EMBEDDING and "output.weight" not in base.file.tensors:
        raise UsageError(
            f"{folder.name} changes {module}, but in {of_base} embedding and output are one matrix",
            hint="neither runtime nor merge can change one of the two: train it without that module",
        )
    shape = tuple(base.model.get_parameter(parameter).shape)
    wanted = shape[::-1] if tensor == EMBEDDING else shape
    if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != wanted or a.shape[0] != b.shape[1]:
        raise ArtifactError(
            f"{folder.name} does not fit {module} of {of_base}",
            evidence=f"the model's is {shape}; A is {tuple(a.shape)}, B is {tuple(b.shape)}",
            hint="give the GGUF of the model that it was trained on",
        )


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    """By what B A counts, as peft computes it (tuners/lora/layer.py, update_layer)."""
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha))
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _to_peft(adapter: Path, base: _Base, output: Path) -> None:
    model = read_adapter(adapter)
    modules = {tensor: name.rpartition(".")[0] for name, tensor in base.names.items() if name.endswith(".weight")}
    if EMBEDDING in model.pairs and "output.weight" not in base.file.tensors:
        raise UsageError(
            f"{adapter.name} changes the token embedding, which in this model is the output's matrix too",
            hint="train it without the embedding",
        )
    tensors: dict[str, torch.Tensor] = {}
    for target, pair in model.pairs.items():
        if target not in modules or pair.a.ndim != 2:
            raise UsageError(
                f"{adapter.name} changes {target}, for which transformers has no module of its own",
                hint="train it without that matrix",
            )
        tensors |= _peft_tensors(f"{_PREFIX}{modules[target]}", target, pair, base)
    ranks = {modules[target]: pair.rank for target, pair in model.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    own = {module: its for module, its in ranks.items() if its != rank}
    alpha = model.alpha or float(rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        rank_pattern=own,
        alpha_pattern={} if model.alpha else own,
        target_modules=_named(set(ranks), base.model),
        use_dora=model.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.file.first.path.name,
        inference_mode=True,
    )
    output.mkdir()
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (output / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def _peft_tensors(stem: str, target: str, pair: Pair, base: _Base) -> dict[str, torch.Tensor]:
    if target == EMBEDDING:
        return {f"{stem}.lora_embedding_A": _tensor(pair.b.T), f"{stem}.lora_embedding_B": _tensor(pair.a.T)}
    order = base.row_order(target, len(pair.b))
    rows = slice(None) if order is None else order
    made = {f"{stem}.lora_A.weight": _tensor(pair.a), f"{stem}.lora_B.weight": _tensor(pair.b[rows])}
    if pair.magnitude is not None:
        made[f"{stem}.lora_magnitude_vector"] = _tensor(pair.magnitude[rows])
    return made


def _named(wanted: set[str], model: PreTrainedModel) -> list[str]:
    """Short names where these mean the same modules, else each in full."""
    short = {module.rpartition(".")[2] for module in wanted}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == wanted else wanted)


def _tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
