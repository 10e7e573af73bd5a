"""`BOARDS`: machines with this chip, by what their firmware calls them; power and profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

DMI = "/sys/class/dmi/id"

POWER_GUIDE = "deseven/strixhalo-homelab: Guides/Power_Modes_and_Performance.md (measured)"

ANY_BIOS = (
    "look for UMA Frame Buffer Size or iGPU Memory Size, often under Advanced → AMD CBS → NBIO →"
    " GFX Configuration"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One machine. What nobody published is empty, and said to be unknown."""

    name: str
    words: tuple[str, ...]
    """Found in the DMI fields, lower case."""
    bios: str
    """Where the setup keeps the VRAM carve-out."""
    power: str
    source: str


BOARDS = (
    Board(
        name="Framework Desktop",
        words=("desktop (amd ryzen ai max", "franmfcp"),
        bios="F2 at start → Setup Utility → Advanced → iGPU Memory Configuration: Custom →"
        " iGPU Memory Size: 0.5 GB",
        power="120 W sustained, 140 W peak",
        source="owners' notes on BIOS 03.05 (claimed)",
    ),
    Board(
        name="Minisforum MS-S1 MAX",
        words=("ms-s1 max", "ms-s1max"),
        bios=f"Del at start; {ANY_BIOS}",
        power="modes in the BIOS; its 10G network needs kernel 6.17.11 or 6.18",
        source="deseven/strixhalo-homelab: Hardware/PCs/Minisforum_MS-S1_MAX.md",
    ),
    Board(
        name="Sixunited AXB35 (GMKtec EVO-X2, Bosgame M5, FEVM FA-EX9, NIMO)",
        words=("evo-x2", "axb35", "bosgame m5", "fa-ex9"),
        bios="Del at start → Advanced → GFX Configuration → iGPU Configuration: UMA_SPECIFIED →"
        " UMA Frame buffer Size: 512M",
        power="55, 85 or 120 W by the button, the BIOS or the module ec_su_axb35",
        source="deseven/strixhalo-homelab: Hardware/Boards/Sixunited_AXB35.md",
    ),
    Board(
        name="Beelink GTR9 Pro",
        words=("gtr9",),
        bios="Del at start → AMD CBS → UMA Frame buffer Size: 512M (it comes as 96G)",
        power="120 W; 140 W by AMD CBS → SMU Common Options → System Configuration",
        source="a published decoding of BIOS GTRPRPI1001C (claimed)",
    ),
    Board(
        name="HP Z2 Mini G1a / ZBook Ultra G1a",
        words=("z2 mini g1a", "zbook ultra"),
        bios=f"F10 at start; {ANY_BIOS}",
        power="by the BIOS and platform_profile",
        source="not checked on the machine (claimed)",
    ),
    Board(
        name="ASUS ROG Flow Z13 (2025)",
        words=("flow z13", "gz302"),
        bios=f"F2 at start → Advanced; {ANY_BIOS}",
        power="by platform_profile (asusd)",
        source="not checked on the machine (claimed)",
    ),
)


def _dmi(view: HostView) -> list[str]:
    names = ("sys_vendor", "product_name", "board_vendor", "board_name")
    return [text for name in names if (text := view.read(f"{DMI}/{name}"))]


def find_board(view: HostView) -> Board | None:
    """The row of `BOARDS` for this machine, if it has one."""
    text = " ".join(_dmi(view)).lower()
    return next((board for board in BOARDS if any(word in text for word in board.words)), None)


def bios_path(view: HostView) -> str:
    """Where this machine's setup keeps the carve-out, as far as it is known."""
    board = find_board(view)
    return board.bios if board else ANY_BIOS


def check_board(view: HostView) -> Iterator[Finding]:
    """Which machine this is."""
    if view.strix_halo is None:
        return
    board = find_board(view)
    bios = view.read(f"{DMI}/bios_version") or "unknown"
    name = board.name if board else " ".join(dict.fromkeys(_dmi(view))) or "unknown"
    yield Finding(
        status="ok",
        saw=f"{name}, BIOS {bios} ({DMI})",
        why=f"carve-out: {bios_path(view)}; power: {board.power if board else 'not known here'}",
        source=board.source if board else DMI,
    )


def check_power(view: HostView) -> Iterator[Finding]:
    """A profile or a cap that slows the whole night down."""
    if view.strix_halo is None:
        return
    profile = view.read("/sys/firmware/acpi/platform_profile")
    if profile in ("low-power", "quiet", "cool"):
        yield Finding(
            status="warn",
            saw=f"platform profile {profile} (/sys/firmware/acpi/platform_profile)",
            why="it caps the socket's power: 120 W do 26.5 % more work than 55 W on the CPU, and"
            " the GPU shares the budget",
            fix=Fix(
                "use the fastest profile for training",
                ("echo performance | sudo tee /sys/firmware/acpi/platform_profile",),
            ),
            source=POWER_GUIDE,
        )
    yield from _power_cap(view)
    if profile not in ("low-power", "quiet", "cool"):
        saw = f"platform profile {profile or 'not offered by this firmware'}"
        yield Finding(status="ok", saw=saw, why="no cap from here", source=POWER_GUIDE)


def _power_cap(view: HostView) -> Iterator[Finding]:
    card = view.strix_halo
    for cap in sorted(card.folder.glob("hwmon/hwmon*/power1_cap")) if card else ():
        now, default = view.read_int(cap), view.read_int(cap.with_name("power1_cap_default"))
        if now is not None and default is not None and 0 < now < default:
            yield Finding(
                status="warn",
                saw=f"GPU capped at {now // 10**6} W of {default // 10**6} W ({view.shown(cap)})",
                why="training is slower by what the cap takes away",
                fix=Fix("put the default back", (f"echo {default} | sudo tee {view.shown(cap)}",)),
                source="https://docs.kernel.org/gpu/amdgpu/thermal.html",
            )
