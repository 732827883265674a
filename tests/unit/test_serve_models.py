"""How many clients a machine is planned for, and how many models at once."""

from __future__ import annotations

import pytest

from runtime.memory.devices import devices_described, devices_here
from runtime.memory.here import Planned, plan_here
from runtime.serve.models import fits_together, most_clients, require_together
from runtime.settings import Setting
from tests.described import machine
from tests.described_models import known
from tests.unit.test_plan_cases import CPU, CUDA
from toolchain.base.errors import MemoryFitError


def planned(vram: str, n_ctx: int = 4096, *, clients: int = 1) -> Planned:
    """Llama 3 8B for a card."""
    devices = devices_described(ram="64GiB", vram=(vram,), unified=None, here=devices_here(machine(), CPU))
    asked = {"n_ctx": Setting(name="n_ctx", value=n_ctx, origin="flag")}
    return plan_here(
        [known("llama-8b")], asked, machine(), sequences=clients, separate=True, devices=devices, build=CUDA
    )


@pytest.mark.parametrize(("vram", "clients"), [("24GiB", 4), ("7GiB", 2), ("6GiB", 1)])
def test_more_clients_push_no_layer_off_the_card(vram: str, clients: int) -> None:
    one = planned(vram)
    wider, found = most_clients(one)
    assert found == clients
    assert wider.plan.fits
    assert wider.plan.demand.n_ctx == clients * 4096
    assert wider.plan.choice.layout.n_gpu_layers == one.plan.choice.layout.n_gpu_layers


def test_plan_holds_the_context_of_every_client() -> None:
    one, four = planned("48GiB"), planned("48GiB", clients=4)
    for mine, theirs in zip(one.plan.devices, four.plan.devices, strict=True):
        assert theirs.kv_bytes == 4 * mine.kv_bytes
        assert theirs.weights_bytes == mine.weights_bytes


def test_what_does_not_fit_says_so_for_all_clients_and_offers_a_context_for_each() -> None:
    plan = planned("8GiB", 131072, clients=200).plan
    assert not plan.fits
    assert plan.demand.n_ctx_each == 131072
    offered = int(plan.instead.split("--n-ctx ")[1].split()[0].rstrip(",;"))
    assert planned("8GiB", offered, clients=200).plan.fits


def test_models_are_loaded_together_as_far_as_they_fit() -> None:
    plan = planned("24GiB").plan
    card = plan.devices[1]
    room = (card.free_bytes - card.margin_bytes) // card.used_bytes
    assert 1 < room < 9
    assert fits_together([plan] * 9) == room
    require_together([plan] * 9, room)
    with pytest.raises(MemoryFitError, match="do not fit in memory together") as refusal:
        require_together([plan] * 9, room + 1)
    assert f"--models-max {room}" in refusal.value.hint
    assert card.name in refusal.value.evidence
