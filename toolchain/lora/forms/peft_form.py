"""Adapters to and from PEFT's form: a folder with adapter_config.json and adapter_model.safetensors.

From PEFT goes through llama.cpp's own converter, in a child that runs no code of anybody's model; what that converter
does not read (rsLoRA's scale, ranks and alphas of single modules) is brought into the matrices before. The transformers
configuration that both ways need is made from the base's GGUF. Nothing here reads pickles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from toolchain.base import command, console, files
from toolchain.base.errors import ArtifactError, CommandError, MissingError, UsageError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.build.toolchain import Toolchain
from toolchain.lora.child_errors import raise_failure
from toolchain.lora.forms.adapter import AdapterModel, check_against, read_adapter, write_adapter
from toolchain.stages import convert_child

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLE: Final = "adapter_model.bin"
_MERGE_IN_PEFT: Final = "merge it with peft (merge_and_unload), and convert the whole model with `./inv quantize`"
# Keys of adapter_config.json that make more of an adapter than pairs of matrices, with what they stand for.
_BEYOND_PAIRS: Final[Mapping[str, str]] = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "single token embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an activation in the middle of a prompt (aLoRA)",
    "target_parameters": "adapters of stacked experts",
    "lora_bias": "biases",
    "use_qalora": "QA-LoRA's pooled inputs",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a choice among adapters (Arrow)",
    "kasa_config": "singular values (KaSA)",
    "monteclora_config": "drawn matrices (MonteCLoRA)",
    "megatron_config": "Megatron's parallel layers",
}
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings that take what they put into A and B from the base's weights (``update_layer`` in peft's
tuners/lora/layer.py): the adapter alone is not the whole of what was learned."""
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": None}


def from_peft(folder: Path, base: Path, output: Path, *, toolchain: Toolchain, log: Path) -> AdapterModel:
    """Write the PEFT adapter in ``folder`` as GGUF for the model ``base`` to ``output``, in one step; what it is.

    UsageError for a folder that holds no adapter or one that GGUF cannot carry, ArtifactError when it does not fit
    ``base``.
    """
    _check_folder(folder)
    header = read_header(base)
    with console.step(f"convert {folder.name} to GGUF"), files.staged(output) as partial:
        room = partial.parent
        _child(room, {"do": "from", "folder": str(folder.absolute()), "base": str(base.absolute())}, log)
        converted = room / "converted.gguf"
        script = toolchain.convert_dir / "convert_lora_to_gguf.py"
        asked = ("--base", room / "base", "--outtype", "f32", "--outfile", converted, room / "peft")
        command.run(
            (sys.executable, convert_child.__file__, script, *asked),
            what="converting the adapter",
            env=_OFFLINE,
            log=log,
            hint="the converter knows no such module: train the adapter on attention and feed-forward matrices only",
        )
        found = read_adapter(converted)
        check_against(found, header, what=folder.name)
        adapter = AdapterModel(
            architecture=found.architecture,
            alpha=found.alpha,
            pairs=found.pairs,
            base_sha256=tensors_sha256(header),
            base_name=header.path.name,
            name=output.stem,
            notes={"source": f"peft:{folder.name}"},
        )
        write_adapter(partial, adapter)
    return adapter


def to_peft(adapter: Path, base: Path, output: Path, *, log: Path) -> None:
    """Write the GGUF adapter for the model ``base`` as a PEFT folder, with transformers' names, to ``output``.

    The folder appears in one step. UsageError for an adapter that PEFT's form cannot carry, or where a folder of
    another kind is in the way; ArtifactError when it does not fit ``base``.
    """
    model = read_adapter(adapter)
    check_against(model, read_header(base), what=adapter.name)
    if model.norms:
        raise UsageError(
            f"{adapter.name} changes {len(model.norms)} norms too, which PEFT's form has no place for",
            hint="`./inv merge` carries them",
        )
    if output.exists() and not (output / CONFIG).is_file():
        raise UsageError(f"{output} is there and is no PEFT adapter", hint="name another folder with --output")
    with console.step(f"convert {adapter.name} to PEFT form"), files.staging(output) as partial:
        room = partial.parent
        _child(room, {"do": "to", "adapter": str(adapter.absolute()), "base": str(base.absolute())}, log)
        files.promote(room / "peft", output)


def _child(room: Path, request: Mapping[str, Any], log: Path) -> None:
    """``peft_child`` at work in ``room``: it imports transformers, this process does not."""
    asked = room / "request.json"
    files.write_json(asked, request)
    try:
        command.run(
            (sys.executable, "-m", "toolchain.lora.forms.peft_child", asked),
            what="converting the adapter",
            cwd=files.PROJECT_ROOT,
            env=_OFFLINE,
            log=log,
        )
    except (CommandError, MissingError) as error:
        raise_failure(room, error)


def _check_folder(folder: Path) -> None:
    """UsageError unless ``folder`` holds an adapter of nothing but pairs, in safetensors."""
    if not (folder / CONFIG).is_file():
        there = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
        raise UsageError(
            f"{folder} is not an adapter in PEFT form: it has no {CONFIG}",
            evidence=f"it holds: {', '.join(there) or 'nothing'}",
            hint="name the folder that peft's save_pretrained wrote",
        )
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise UsageError(
                f"{folder / _PICKLE} is a pickle, which can run code when it is read",
                evidence=f"there is no {WEIGHTS} beside it",
                hint="if you trust it: python -c 'import sys, torch, safetensors.torch as s; "
                "s.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])' "
                f"{command.shown([folder / _PICKLE, folder / WEIGHTS])}",
            )
        raise UsageError(f"{folder} has no {WEIGHTS}", hint="name the folder that peft's save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / CONFIG} cannot be read", evidence=str(error), hint="download it again"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UsageError(f"{folder.name} is a PEFT adapter of the kind {kind!r}, not LORA", hint=_MERGE_IN_PEFT)
    beyond = [words for key, words in _BEYOND_PAIRS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append("biases")
    if beyond:
        raise UsageError(
            f"{folder.name} has more than pairs of matrices: {', '.join(beyond)}",
            evidence=str(folder / CONFIG),
            hint=_MERGE_IN_PEFT,
        )
    if (begun := str(config.get("init_lora_weights")).lower()).startswith(_CHANGED_BASE):
        raise UsageError(
            f"{folder.name} belongs to a changed base: it began as {begun}, which takes from the base's weights",
            evidence=str(folder / CONFIG),
            hint="save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), see peft's "
            f"documentation of {begun}; or {_MERGE_IN_PEFT}",
        )
