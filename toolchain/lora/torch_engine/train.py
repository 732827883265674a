"""A training from its spec to its adapter, as the process that ``child`` is in goes through it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from toolchain.base import files
from toolchain.base.errors import INTERRUPTED_EXIT_CODE, MemoryFitError
from toolchain.base.gguf import read_header
from toolchain.base.tensor_hash import tensors_sha256
from toolchain.lora.dataset_file import Dataset, read_dataset
from toolchain.lora.forms.adapter import write_adapter
from toolchain.lora.spec import ADAPTER, CHECKPOINTS, METRICS, OUTCOME, TrainOutcome, TrainSpec
from toolchain.lora.torch_engine.adapt import ADAPTER_NAME, adapt, adapter_model
from toolchain.lora.torch_engine.agree import require_agreement
from toolchain.lora.torch_engine.checkpoint import Counted, last_checkpoint, restore, save_checkpoint
from toolchain.lora.torch_engine.load import load_base
from toolchain.lora.torch_engine.loop import Loop, Timed, is_packed, stopping_between_steps
from toolchain.lora.torch_engine.loss import examples_stay_apart
from toolchain.lora.torch_engine.memory import MemoryWatch

ADAPTER_GGUF: Final = "adapter.gguf"
_IDENTITY: Final = (
    *("rank", "alpha", "dropout", "targets", "rslora", "dora", "n_ctx", "rows", "steps", "learning_rate"),
    *("schedule", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "dtype"),
)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A prepared training: the base is loaded and agrees with the library, the adapter is as new."""

    spec: TrainSpec
    dataset: Dataset
    loop: Loop
    accelerator: Accelerator
    watch: MemoryWatch
    weight_bytes: int
    base_sha256: str

    @property
    def writes(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def run_dir(self) -> Path:
        return Path(self.spec.run_dir)


def train(spec: TrainSpec) -> int:
    """Load, compare with the library, train, judge on the held-out rows, write; returns the exit code."""
    torch.set_num_threads(spec.n_threads)
    if spec.device == "cuda":  # a resumed run shall be the same run; where torch cannot, it warns
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it is written before it is read
    accelerator = Accelerator(cpu=spec.device == "cpu", mixed_precision="bf16" if spec.dtype == "bfloat16" else "no")
    try:
        run = _prepare(spec, accelerator)
        return _probe(run) if spec.probe_steps else _train(run)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise MemoryFitError(
            f"{spec.micro_rows} rows of {spec.n_ctx} tokens at once do not fit in memory",
            evidence=str(error).partition("\n")[0],
            hint="lower train.micro_batch or train.n_ctx, or set train.gradient_checkpointing to true",
        ) from error
    finally:
        accelerator.end_training()


def _prepare(spec: TrainSpec, accelerator: Accelerator) -> _Run:
    paths = [Path(shard) for shard in spec.base]
    base_sha256 = tensors_sha256(read_header(paths[0])) if accelerator.is_main_process else ""
    watch = MemoryWatch(spec.device)
    dataset = read_dataset(Path(spec.dataset))
    loaded = load_base(
        paths,
        lib_dir=Path(spec.lib_dir),
        packed=spec.packed,
        device=accelerator.device,
        dtype=getattr(torch, spec.dtype),
        n_threads=spec.n_threads,
    )
    require_agreement(loaded.model, dataset.probe_ids, dataset.probe_logits)
    packed = is_packed(dataset.train) or is_packed(dataset.held)
    packs = not packed or examples_stay_apart(loaded.model, dataset.probe_ids)
    adapted = adapt(loaded.model, spec)
    if spec.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # needs no gradient at the embedding
    optimizer = torch.optim.AdamW(
        list(adapted.parameters.values()), lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    return _Run(
        spec=spec,
        dataset=dataset,
        loop=Loop(
            spec=spec,
            adapted=adapted,
            rows=dataset.train,
            optimizer=optimizer,
            accelerator=accelerator,
            packs=packs,
        ),
        accelerator=accelerator,
        watch=watch,
        weight_bytes=loaded.weight_bytes,
        base_sha256=base_sha256,
    )


def _probe(run: _Run) -> int:
    """Take a few steps, tell what they cost; nothing else is written."""
    counted = Counted(step=0)
    for timed in run.loop.steps(0, run.spec.probe_steps):
        counted = _advanced(counted, timed, begun=0, last=run.spec.probe_steps)
    _write_outcome(run, counted, None)
    return 0


def _train(run: _Run) -> int:
    spec, loop = run.spec, run.loop
    counted = _resume(run)
    with stopping_between_steps(loop.interrupt):
        counted, saved = _take_steps(run, counted)
        if counted.step < spec.steps or loop.interrupt.asked:
            if not saved:
                _save(run, counted)
            return INTERRUPTED_EXIT_CODE
    held_out_after = loop.mean_loss(run.dataset.held)
    if run.writes:
        _write_adapter(run)
    _write_outcome(run, counted, held_out_after)
    return 0


def _resume(run: _Run) -> Counted:
    """Go on from the last checkpoint that is whole, in all processes; else begin, with the held-out rows' loss."""
    found: list[Any] = [None]
    if run.writes:
        folder = run.run_dir / CHECKPOINTS
        if folder.exists():
            files.sweep(folder)
        found = [last_checkpoint(folder, identity=_identity(run), warn=_warn)]
        done = found[0].counted.step if found[0] else 0
        if not _cut_curve(run.run_dir / METRICS, done):
            _warn(f"{METRICS} does not reach step {done}: the training begins anew")
            found = [None]
            _cut_curve(run.run_dir / METRICS, 0)
    broadcast_object_list(found)
    if found[0] is None:
        return Counted(step=0, held_out_before=run.loop.mean_loss(run.dataset.held))
    restore(found[0], run.loop.adapted.parameters, run.loop.optimizer)
    counted: Counted = found[0].counted
    return counted


def _take_steps(run: _Run, counted: Counted) -> tuple[Counted, bool]:
    """The steps that are left, with curve and checkpoints; what was counted, and whether it is in a checkpoint."""
    spec, begun, saved = run.spec, counted.step, counted.step > 0
    path = run.run_dir / METRICS
    with files.disk_errors(path), (path if run.writes else Path(os.devnull)).open("a") as curve:
        for timed in run.loop.steps(begun, spec.steps):
            line = json.dumps(asdict(timed.line)) + "\n"
            curve.write(line)
            curve.flush()
            if run.writes:
                sys.stdout.write(line)
                sys.stdout.flush()
            counted = _advanced(counted, timed, begun=begun, last=spec.steps)
            saved = counted.step % spec.checkpoint_steps == 0 or counted.step == spec.steps
            if saved:
                _save(run, counted)
    return counted, saved


def _advanced(counted: Counted, timed: Timed, *, begun: int, last: int) -> Counted:
    """With one more step; a process's first one, which warms up, is timed only where it stays alone."""
    step = timed.line.step
    if step == begun + 1 < last:
        return replace(counted, step=step)
    return replace(
        counted,
        step=step,
        timed_steps=counted.timed_steps + 1,
        seconds=counted.seconds + timed.seconds,
        tokens=counted.tokens + timed.tokens,
    )


def _save(run: _Run, counted: Counted) -> None:
    if run.writes and counted.step:
        curve = run.run_dir / METRICS
        with curve.open("rb") as written:
            os.fsync(written.fileno())
        parameters, optimizer = run.loop.adapted.parameters, run.loop.optimizer
        save_checkpoint(run.run_dir / CHECKPOINTS, counted, parameters, optimizer, identity=_identity(run))


def _identity(run: _Run) -> str:
    """Of all that the trained numbers depend on, but for the order in which processes and threads add them up."""
    told = asdict(run.spec)
    numbers = {name: told[name] for name in _IDENTITY}
    return files.digest([numbers, run.base_sha256, files.sha256_file(Path(run.spec.dataset))])


def _cut_curve(path: Path, step: int) -> bool:
    """Take away what was written after ``step``; False where the lines up to it are not all there."""
    lines = path.read_bytes().splitlines(keepends=True)[:step] if path.exists() else []
    whole = len(lines) == step and (not lines or lines[-1].endswith(b"\n"))
    if whole and path.exists():
        with files.disk_errors(path):
            os.truncate(path, sum(map(len, lines)))
    return whole


def _write_adapter(run: _Run) -> None:
    """The adapter in both forms, PEFT's and GGUF."""
    base, adapted = Path(run.spec.base[0]), run.loop.adapted
    adapted.peft.peft_config[ADAPTER_NAME].base_model_name_or_path = base.name
    with files.staged(run.run_dir / ADAPTER) as partial:
        try:
            adapted.peft.save_pretrained(str(partial), save_embedding_layers=False)
        except SafetensorError as error:
            raise files.disk_full(run.run_dir / ADAPTER, str(error)) from error
        (partial / "README.md").unlink()  # peft's form to be filled in
        (partial / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)
    with files.staged(run.run_dir / ADAPTER_GGUF) as partial:
        made = adapter_model(
            adapted,
            architecture=read_header(base).architecture,
            base_sha256=run.base_sha256,
            base_name=base.name,
            name=f"{base.stem} adapter",
        )
        write_adapter(partial, made)


def _write_outcome(run: _Run, counted: Counted, held_out_after: float | None) -> None:
    bytes_here = [run.weight_bytes, run.watch.import_bytes, run.watch.peak_bytes()]
    held = torch.tensor([bytes_here], dtype=torch.int64, device=run.accelerator.device)
    weight_bytes, import_bytes, peak_bytes = run.accelerator.gather(held).amax(0).tolist()
    outcome = TrainOutcome(
        steps=counted.step,
        tokens_per_second=counted.tokens / counted.seconds if counted.seconds else 0.0,
        seconds_per_step=counted.seconds / counted.timed_steps if counted.timed_steps else 0.0,
        weight_bytes=weight_bytes,
        import_bytes=import_bytes,
        peak_bytes=peak_bytes,
        trained_parameters=run.loop.adapted.trained_parameters,
        held_out_before=counted.held_out_before,
        held_out_after=held_out_after,
    )
    if run.writes:
        files.write_json(run.run_dir / OUTCOME, asdict(outcome))


def _warn(text: str) -> None:
    sys.stdout.write(json.dumps({"warning": text}) + "\n")
    sys.stdout.flush()


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's allocators say it in words of their own, the one of the CPU in a plain RuntimeError."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)
