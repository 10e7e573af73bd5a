"""Rates of this machine: measured here first, else those of the same chip, else none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_hardware import record_card, record_meminfo

from strixft.catalog.device_rates import device_name, hosts_file, row_of, with_rates, write_rates
from strixft.catalog.hosts import HOSTS, Host, Sourced, this_host
from strixft.guard.host import find_host
from strixft.support.errors import HostError

MINE = Sourced(value=1e11, mark="measured", source="strixft bench bandwidth, 2026-11-25")


def gpu(name: str) -> Host:
    """A card of its own, as torch names it."""
    return replace(HOSTS["h100-80"], name=name, bandwidth_bytes_per_s=None, matmul_flop_per_s={})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA GB10", "dgx-spark"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_chip_is_known_by_its_name(name: str, row: str | None, tmp_path: Path) -> None:
    found = row_of(gpu(name), tmp_path)
    assert (found and found.name) == row


def test_a_chip_that_is_not_known_has_no_rates(tmp_path: Path) -> None:
    host = with_rates(gpu("NVIDIA GeForce RTX 4090"), tmp_path)
    assert host.bandwidth_bytes_per_s is None
    assert host.matmul_flop_per_s == {}


def test_a_known_chip_has_the_rates_of_its_row(tmp_path: Path) -> None:
    bus = with_rates(gpu("NVIDIA H200"), tmp_path).bus_bytes_per_s
    assert bus == HOSTS["h200-141"].bus_bytes_per_s


def test_measured_rates_come_before_those_of_the_table(tmp_path: Path) -> None:
    write_rates("NVIDIA H200", bandwidth=MINE)
    host = with_rates(gpu("NVIDIA H200"), tmp_path)
    assert host.bandwidth_bytes_per_s == MINE
    assert host.matmul_flop_per_s == HOSTS["h200-141"].matmul_flop_per_s
    write_rates("NVIDIA H200", matmul={"float32": MINE})
    host = with_rates(gpu("NVIDIA H200"), tmp_path)
    assert host.bandwidth_bytes_per_s == MINE
    assert host.matmul_flop_per_s["float32"] == MINE
    assert "bfloat16" in host.matmul_flop_per_s


def test_rates_of_another_device_are_not_taken(tmp_path: Path) -> None:
    write_rates("NVIDIA L4", bandwidth=MINE)
    assert with_rates(gpu("NVIDIA H200"), tmp_path).bandwidth_bytes_per_s != MINE


def test_this_machine_plans_with_what_was_measured_on_it() -> None:
    host = find_host("cpu")
    assert host.bandwidth_bytes_per_s is None
    write_rates(device_name(host), bandwidth=MINE, matmul={"float32": MINE})
    assert find_host("cpu").bandwidth_bytes_per_s == MINE


def test_a_strix_halo_is_known_by_its_number(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    device = record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    (device / "device").write_text("0x1586\n")
    host = this_host(tmp_path, device="cuda")
    assert device_name(host, tmp_path) == "amd 0x1586"
    assert with_rates(host, tmp_path).matmul_flop_per_s == HOSTS["strix-halo-128"].matmul_flop_per_s


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "hosts": {}}', '{"format": 1}', "\x00"])
def test_a_file_of_another_version_is_told_and_kept(text: str) -> None:
    hosts_file().parent.mkdir(parents=True)
    hosts_file().write_text(text)
    with pytest.raises(HostError, match="holds no measured rates of this version") as caught:
        find_host("cpu")
    assert f"mv {hosts_file()} {hosts_file()}.old" in caught.value.fix
    with pytest.raises(HostError):
        write_rates("x", bandwidth=MINE)
    assert hosts_file().read_text() == text
