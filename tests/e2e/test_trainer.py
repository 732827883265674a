"""The trainer of 2023 on a base that this project makes: a demo model with as many KV heads as heads, quantized."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.front_door import inv_json
from toolchain.build.toolchain import Toolchain, load

RECIPE = """\
name: {name}
model: {{demo: tiny-mha}}
quantize: [Q8_0]
"""


@pytest.fixture(scope="session")
def demo_mha(toolchain: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base as Q8_0."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "demo-mha.yaml").write_text(RECIPE.format(name="demo-mha"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOUNDRY_MODELS", str(folder / "models"))
        made = inv_json("quantize", folder / "demo-mha.yaml")
    return Path(made["artifacts"][0]["path"])


def test_the_trainer_loads_the_demo_base_and_takes_three_steps(demo_mha: Path, tmp_path: Path) -> None:
    trainer = load(inv_json("build", "--legacy-finetune")["toolchain_id"])
    assert trainer is not None
    text, adapter = tmp_path / "text.txt", tmp_path / "adapter.bin"
    text.write_text("The import statement finds a module and binds its name in the local scope.\n" * 12)
    argv: list[str | Path] = [trainer.tool("finetune"), "--model-base", demo_mha, "--train-data", text]
    argv += ["--lora-out", adapter, "--checkpoint-in", "none", "--checkpoint-out", "", "--save-every", "0"]
    argv += ["--adam-iter", "3", "--adam-alpha", "0.01", "--warmup", "0", "--lora-r", "4", "--seed", "1"]
    argv += ["--ctx", "64", "--batch", "2", "--threads", "2"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-2000:]
    losses = {int(step): float(loss) for step, loss in re.findall(r"\biter=\s*(\d+)\b.*?\bloss=(\S+)", told)}
    assert losses[3] < losses[1]
    assert adapter.stat().st_size > 10_000
