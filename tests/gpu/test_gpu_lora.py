"""On a machine with an NVIDIA GPU: the base stays packed there, and what is learned is what the CPU learns.

Asked for by name, this tier fails where there is no GPU or where torch cannot use it; it never passes by skipping.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.generated_models import write_model
from tests.lora_runs import counting_rows, library_loss, make_dataset, train_child, train_spec
from toolchain.base.machine import probe
from toolchain.build.toolchain import Toolchain
from toolchain.lora.dataset_file import Rows, read_dataset
from toolchain.lora.spec import TrainOutcome, TrainSpec

N_VOCAB, N_CTX = 4096, 32
TYPES = ("Q4_K_M", "Q5_1", "IQ4_XS", "F16")
"""K-quants, a legacy type, one with a table, and a plain one: each has operations of its own on the device."""


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    import torch

    assert probe().gpus, "no NVIDIA GPU is visible to this process"
    assert torch.cuda.is_available(), f"torch {torch.__version__} cannot use the GPU: install one with CUDA into .venv"


@pytest.fixture(scope="module", params=TYPES)
def spec(request: pytest.FixtureRequest, toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """Two steps without dropout on a grouped-query base of 20 MB in F16, most of it matrices."""
    folder, kind = tmp_path_factory.mktemp("gpu"), request.param
    full = write_model(
        folder / "f16.gguf",
        "llama",
        type="f16",
        random=True,
        n_layer=4,
        n_embd=512,
        head=128,
        n_ff=1024,
        n_vocab=N_VOCAB,
    )
    base = folder / f"{kind}.gguf"
    subprocess.run([toolchain.tool("quantize"), full, base, kind], check=True, capture_output=True)
    train = counting_rows(8, N_CTX, n_vocab=N_VOCAB, seed=1)
    held = Rows(ids=train.ids[:2], labels=train.labels[:2], positions=train.positions[:2])
    dataset = make_dataset(folder / "data.npz", base, train, held)
    return train_spec(base, dataset, folder / "run", toolchain.lib_dir, n_ctx=N_CTX, steps=2, dropout=0.0)


def trained(spec: TrainSpec, **changes: Any) -> tuple[list[dict[str, Any]], TrainOutcome]:
    """The loss curve and the outcome of the training on a device, in a folder of its own."""
    chosen = replace(spec, run_dir=f"{spec.run_dir}-{'-'.join(map(str, changes.values()))}", **changes)
    done = train_child(chosen)
    assert done.returncode == 0, done.stderr
    folder = Path(chosen.run_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, TrainOutcome.from_json(json.loads((folder / "outcome.json").read_text()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 2e-2)])
def test_losses_and_gradients_are_the_cpu_s(spec: TrainSpec, dtype: str, tolerance: float) -> None:
    """Relative: TF32 is off by default, sums are taken in another order; bfloat16 has 8 bits."""
    here, _ = trained(spec, device="cpu", dtype="float32")
    there, outcome = trained(spec, device="cuda", dtype=dtype)
    assert len(here) == len(there) == 2
    for name in ("loss", "grad_norm"):
        wanted, found = ([line[name] for line in curve] for curve in (here, there))
        np.testing.assert_allclose(found, wanted, rtol=tolerance if name == "loss" else 10 * tolerance)
    assert outcome.held_out_after is not None


def test_weights_stay_packed_on_the_device(spec: TrainSpec) -> None:
    """Within 1.15 of the file; and the most that is in use at any time is less than with unpacked ones."""
    _, packed = trained(spec, device="cuda", dtype="float32", packed=True)
    _, unpacked = trained(spec, device="cuda", dtype="float32", packed=False)
    assert packed.weight_bytes <= 1.15 * Path(spec.base[0]).stat().st_size
    assert packed.peak_bytes < unpacked.peak_bytes
    assert packed.peak_bytes >= packed.weight_bytes  # they lie on the device, not in the host's pages


def test_what_the_gpu_learned_is_known_in_the_library(spec: TrainSpec, tmp_path: Path) -> None:
    rows = read_dataset(Path(spec.dataset)).train
    longer = replace(spec, steps=20, rank=8, device="cuda", dtype="bfloat16", run_dir=str(tmp_path / "run"))
    done = train_child(longer)
    assert done.returncode == 0, done.stderr
    base = Path(spec.base[0])
    before = library_loss(base, rows, tmp_path)
    after = library_loss(base, rows, tmp_path, adapter=tmp_path / "run" / "adapter.gguf")
    assert after < before - 1
