"""The host table is sourced, and this machine is read from recorded `/proc` and `/sys` trees."""

from dataclasses import replace
from pathlib import Path

import pytest

from strixft.catalog.hosts import (
    AMD_VENDOR,
    HOSTS,
    Host,
    Sourced,
    amd_memory,
    available_host_memory,
    budget,
    read_meminfo,
    this_host,
)
from strixft.support.errors import FitError, HostError, RecipeError
from strixft.support.units import GIB

NVIDIA_VENDOR = "0x10de"


def record_meminfo(root: Path, available_gib: float) -> None:
    """`/proc/meminfo` as a Strix Halo with 128 GB writes it."""
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(
        "MemTotal:       131072000 kB\n"
        "MemFree:         1048576 kB\n"
        f"MemAvailable:   {round(available_gib * 2**20)} kB\n"
        "HugePages_Total:       0\n"
    )


def record_card(
    root: Path,
    number: int,
    *,
    vendor: str = AMD_VENDOR,
    gtt_gib: float = 0,
    gtt_used_gib: float = 0,
    vram_gib: float = 0,
    vram_used_gib: float = 0,
) -> Path:
    """`/sys/class/drm/card<N>/device` of one card."""
    device = root / f"sys/class/drm/card{number}/device"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    if vendor == AMD_VENDOR:
        sizes = {
            "gtt_total": gtt_gib,
            "gtt_used": gtt_used_gib,
            "vram_total": vram_gib,
            "vram_used": vram_used_gib,
        }
        for name, gib in sizes.items():
            (device / f"mem_info_{name}").write_text(f"{round(gib * GIB)}\n")
    return device


def record_cgroup(
    root: Path, *, limit: str, used_gib: float, group: str = "", cached_gib: float = 0
) -> None:
    """`/sys/fs/cgroup` of a container, or one of its control groups."""
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{round(used_gib * GIB)}\n")
    half = round(cached_gib * GIB / 2)
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {half}\nactive_file {half}\n")


def record_own_cgroup(root: Path, *lines: str) -> None:
    """`/proc/self/cgroup`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def gib(host: Host, reserve_gib: float) -> float:
    """The budget in GiB."""
    return budget(host, reserve_gib).num_bytes / GIB


# The host table.


@pytest.mark.parametrize("host", HOSTS.values(), ids=lambda host: host.name)
def test_every_number_of_a_host_has_a_source(host: Host) -> None:
    numbers = [host.memory_bytes, host.bandwidth_bytes_per_s, *host.matmul_flop_per_s.values()]
    for number in numbers:
        assert number is not None
        assert number.value > 0
        assert number.source
        assert number.mark in ("measured", "vendor", "derived")


@pytest.mark.parametrize("host", HOSTS.values(), ids=lambda host: host.name)
def test_a_host_has_a_rate_for_the_dtype_it_trains_in(host: Host) -> None:
    assert ("bfloat16" if host.bfloat16 else "float16") in host.matmul_flop_per_s


def test_a_strix_halo_of_128_gb_has_a_budget_of_109_gib() -> None:
    assert gib(HOSTS["strix-halo-128"], 16) == 109


def test_a_host_that_is_misspelt_names_the_near_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'strix-halo-128'"):
        HOSTS["strixhalo-128"]


# Budgets.


def test_the_reserve_does_not_come_off_memory_of_a_cards_own() -> None:
    assert gib(HOSTS["h100-80"], 16) == pytest.approx(81559 / 1024)


def test_a_budget_says_where_it_was_read_and_what_came_off() -> None:
    assert budget(HOSTS["dgx-spark"], 16).source == (
        "JustVugg/colibri#136 (measured), less 16 GiB for the host"
    )


def test_a_budget_without_a_reserve_does_not_speak_of_one() -> None:
    assert budget(HOSTS["dgx-spark"], 0).source == "JustVugg/colibri#136 (measured)"


def test_a_reserve_that_leaves_nothing_is_refused_with_a_smaller_one_to_type() -> None:
    small = replace(
        HOSTS["strix-halo-64"],
        memory_bytes=Sourced(value=8 * GIB, mark="read here", source="MemAvailable"),
    )
    with pytest.raises(FitError) as caught:
        budget(small, 16)
    assert caught.value.problem == (
        "strix-halo-64 has nothing left for a run: -8.00 GiB by MemAvailable (read here),"
        " less 16 GiB for the host"
    )
    assert caught.value.fix == "close other programs, or --set memory.reserve_gib=2.0"


def test_a_host_without_any_memory_left_is_not_told_to_reserve_less() -> None:
    full = replace(
        HOSTS["h100-80"], memory_bytes=Sourced(value=0, mark="read here", source="the driver")
    )
    with pytest.raises(FitError) as caught:
        budget(full, 16)
    assert caught.value.fix == "close other programs"


# Memory of the host.


def test_meminfo_is_read_in_bytes(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    assert read_meminfo(tmp_path) == {
        "MemTotal": 125 * GIB,
        "MemFree": GIB,
        "MemAvailable": 120 * GIB,
    }


def test_a_line_of_meminfo_without_a_number_is_left_out(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    with (tmp_path / "proc/meminfo").open("a") as file:
        file.write("Strange\nOdd: lots kB\nOdder:\n")
    assert set(read_meminfo(tmp_path)) == {"MemTotal", "MemFree", "MemAvailable"}


def test_a_system_without_meminfo_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        available_host_memory(tmp_path)
    assert caught.value.problem == (
        f"{tmp_path}/proc/meminfo cannot be read: No such file or directory"
    )
    assert caught.value.fix == "run it on Linux, where /proc is mounted"


def test_a_kernel_that_does_not_say_what_is_available_is_told_of_named_hosts(
    tmp_path: Path,
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 131072000 kB\n")
    with pytest.raises(HostError) as caught:
        available_host_memory(tmp_path)
    assert caught.value.problem == f"{tmp_path}/proc/meminfo has no MemAvailable"
    assert caught.value.fix.endswith("--set memory.host=strix-halo-128")


def test_the_cpu_has_what_the_kernel_calls_available(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    assert gib(this_host(tmp_path), 16) == 104


def test_a_cgroup_with_less_left_counts(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_cgroup(tmp_path, limit=str(32 * GIB), used_gib=2)
    assert available_host_memory(tmp_path).value == 30 * GIB


def test_a_cgroup_with_more_left_than_the_host_does_not_count(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 20)
    record_cgroup(tmp_path, limit=str(32 * GIB), used_gib=2)
    assert available_host_memory(tmp_path).value == 20 * GIB


def test_the_tightest_limit_above_a_process_counts(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_own_cgroup(tmp_path, "0::/user.slice/user-7.slice/jupyter.service")
    record_cgroup(tmp_path, group="user.slice", limit=str(64 * GIB), used_gib=10)
    record_cgroup(tmp_path, group="user.slice/user-7.slice", limit=str(32 * GIB), used_gib=2)
    service = "user.slice/user-7.slice/jupyter.service"
    record_cgroup(tmp_path, group=service, limit="max", used_gib=2)
    found = available_host_memory(tmp_path)
    assert found.value == 30 * GIB
    assert "user.slice/user-7.slice/memory.max" in found.source


def test_the_limit_of_another_process_does_not_count(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 20)
    record_own_cgroup(tmp_path, "0::/user.slice/mine.service")
    record_cgroup(tmp_path, group="user.slice/other.service", limit=str(2 * GIB), used_gib=1)
    assert available_host_memory(tmp_path).value == 20 * GIB


def test_a_limit_of_the_first_version_of_cgroups_counts(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_own_cgroup(tmp_path, "5:cpu:/box", "4:memory:/box", "0::/")
    folder = tmp_path / "sys/fs/cgroup/memory/box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{32 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{12 * GIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {10 * GIB}\n")
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder.parent / "memory.usage_in_bytes").write_text(f"{50 * GIB}\n")
    assert available_host_memory(tmp_path).value == 30 * GIB


def test_files_in_the_page_cache_are_not_used_up(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_cgroup(tmp_path, limit=str(100 * GIB), used_gib=98, cached_gib=96)
    assert available_host_memory(tmp_path).value == 98 * GIB


def test_a_cgroup_without_a_limit_does_not_count(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 20)
    record_cgroup(tmp_path, limit="max", used_gib=2)
    assert available_host_memory(tmp_path).value == 20 * GIB


def test_the_source_tells_the_cgroup_from_the_host(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_cgroup(tmp_path, limit=str(32 * GIB), used_gib=2)
    assert "memory.max" in available_host_memory(tmp_path).source


# Memory of an AMD card.


def test_gtt_larger_than_vram_is_unified_memory(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    assert this_host(tmp_path, device="cuda").unified


def test_this_machine_needs_what_its_row_in_the_table_needs_beside_tensors(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    here, row = this_host(tmp_path, device="cuda"), HOSTS["strix-halo-128"]
    assert here.workspace_bytes == row.workspace_bytes
    assert here.outside_bytes == row.outside_bytes
    assert row.outside_bytes.value > 0


def test_the_reserve_comes_off_what_is_available_and_not_off_gtt(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, gtt_gib=100, vram_gib=0.5)
    assert gib(this_host(tmp_path, device="cuda"), 16) == 100


def test_available_memory_less_the_reserve_counts_where_gtt_is_larger(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 110)
    record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    assert gib(this_host(tmp_path, device="cuda"), 16) == 94


def test_gtt_that_others_use_does_not_count(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, gtt_gib=60, gtt_used_gib=20, vram_gib=0.5)
    assert gib(this_host(tmp_path, device="cuda"), 16) == 40


def test_the_source_of_a_budget_is_what_limits_it(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    device = record_card(tmp_path, 0, gtt_gib=60, vram_gib=0.5)
    source = budget(this_host(tmp_path, device="cuda"), 16).source
    assert source == f"{device}/mem_info_gtt_total − used (read here)"


def test_a_cgroup_limits_unified_memory_too(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_cgroup(tmp_path, limit=str(64 * GIB), used_gib=0)
    record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    assert gib(this_host(tmp_path, device="cuda"), 16) == 48


def test_a_large_carve_out_is_the_cards_own_memory(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 30)
    record_card(tmp_path, 0, gtt_gib=15, vram_gib=96, vram_used_gib=1)
    host = this_host(tmp_path, device="cuda")
    assert (host.unified, gib(host, 16)) == (False, 95)


def test_gtt_as_large_as_vram_is_not_larger(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 64)
    record_card(tmp_path, 0, gtt_gib=60, vram_gib=60)
    assert not this_host(tmp_path, device="cuda").unified


def test_gtt_vram_and_host_memory_are_never_added(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 64)
    record_card(tmp_path, 0, gtt_gib=60, vram_gib=60)
    assert gib(this_host(tmp_path, device="cuda"), 0) == 60


def test_a_card_whose_number_is_not_0_is_found(tmp_path: Path) -> None:
    record_card(tmp_path, 1, gtt_gib=15, vram_gib=96)
    found = amd_memory(tmp_path)
    assert found is not None
    assert found[0].value == 96 * GIB


def test_a_card_of_another_vendor_before_it_is_passed_over(tmp_path: Path) -> None:
    record_card(tmp_path, 0, vendor=NVIDIA_VENDOR)
    device = record_card(tmp_path, 1, gtt_gib=15, vram_gib=96)
    found = amd_memory(tmp_path)
    assert found is not None
    assert found[0].source == f"{device}/mem_info_vram_total − used"


def test_card_2_comes_before_card_10(tmp_path: Path) -> None:
    record_card(tmp_path, 10, vram_gib=10)
    record_card(tmp_path, 2, vram_gib=2)
    found = amd_memory(tmp_path)
    assert found is not None
    assert found[0].value == 2 * GIB


def test_a_connector_of_a_card_is_no_card(tmp_path: Path) -> None:
    record_card(tmp_path, 1, vram_gib=96)
    connector = tmp_path / "sys/class/drm/card1-DP-1"
    connector.mkdir()
    (connector / "device").symlink_to("../card1")
    found = amd_memory(tmp_path)
    assert found is not None
    assert "card1/device" in found[0].source


@pytest.mark.parametrize("text", ["", "garbage\n", "-1\n", "1e9\n", "٣\n", b"\xff\xfe"])
def test_a_card_with_a_number_that_cannot_be_read_is_passed_over(
    tmp_path: Path, text: str | bytes
) -> None:
    device = record_card(tmp_path, 0, gtt_gib=120, vram_gib=0.5)
    data = text if isinstance(text, bytes) else text.encode()
    (device / "mem_info_gtt_total").write_bytes(data)
    record_card(tmp_path, 1, vram_gib=8)
    found = amd_memory(tmp_path)
    assert found is not None
    assert found[0].value == 8 * GIB


def test_a_card_whose_vendor_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    device = record_card(tmp_path, 0, vram_gib=96)
    (device / "vendor").unlink()
    (device / "vendor").mkdir()
    assert amd_memory(tmp_path) is None


def test_a_card_without_memory_numbers_is_passed_over(tmp_path: Path) -> None:
    device = record_card(tmp_path, 0, vram_gib=96)
    (device / "mem_info_vram_used").unlink()
    assert amd_memory(tmp_path) is None


def test_a_machine_without_an_amd_card_is_its_cpu(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, vendor=NVIDIA_VENDOR)
    assert this_host(tmp_path, device="cuda").device == "cpu"


def test_an_amd_card_that_torch_does_not_offer_is_not_used(tmp_path: Path) -> None:
    record_meminfo(tmp_path, 120)
    record_card(tmp_path, 0, vram_gib=96)
    assert this_host(tmp_path, device="cpu").device == "cpu"


def test_this_very_machine_can_be_read() -> None:
    assert budget(this_host(), 0).num_bytes > 0
