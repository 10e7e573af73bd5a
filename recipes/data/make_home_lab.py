"""Writes `home-lab.jsonl`: requests to a home lab in words, each answered by one JSON command.

Five kinds of command, several phrasings, numbers and times; the same seed writes the same file.

    python recipes/data/make_home_lab.py > recipes/data/home-lab.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator

SEED = 7
NUM_CHATS = 480

MACHINES = ("nas", "atlas", "hermes", "pi4", "mediabox", "buildbox", "router", "printserver")
SERVICES = ("jellyfin", "immich", "postgres", "nginx", "homeassistant", "grafana", "forgejo")
FOLDERS = ("photos", "documents", "music", "configs", "databases")
ROOMS = ("office", "kitchen", "garage", "bedroom", "server room")

Command = dict[str, object]


def _power(rng: random.Random) -> tuple[str, Command]:
    action, verb = rng.choice(
        (("wake", "Wake up"), ("wake", "Turn on"), ("shutdown", "Shut down"), ("reboot", "Restart"))
    )
    machine = rng.choice(MACHINES)
    text = rng.choice((f"{verb} {machine}.", f"{verb} {machine}, please.", f"{verb} the {machine}"))
    return text, {"command": "power", "action": action, "machine": machine}


def _service(rng: random.Random) -> tuple[str, Command]:
    action, verb = rng.choice((("start", "Start"), ("stop", "Stop"), ("restart", "Restart")))
    service, machine = rng.choice(SERVICES), rng.choice(MACHINES)
    text = rng.choice(
        (
            f"{verb} {service} on {machine}.",
            f"{verb} the {service} service on {machine}",
            f"On {machine}: {verb.lower()} {service}.",
        )
    )
    return text, {"command": "service", "action": action, "service": service, "machine": machine}


def _backup(rng: random.Random) -> tuple[str, Command]:
    folder, machine = rng.choice(FOLDERS), rng.choice(MACHINES)
    hour, minute = rng.randrange(24), rng.choice((0, 15, 30, 45))
    at = f"{hour:02}:{minute:02}"
    text = rng.choice(
        (
            f"Back up {folder} to {machine} at {at}.",
            f"Copy my {folder} to {machine} every day at {at}",
            f"At {at}, back up the {folder} to {machine}.",
        )
    )
    return text, {"command": "backup", "folder": folder, "machine": machine, "at": at}


def _climate(rng: random.Random) -> tuple[str, Command]:
    room, degrees = rng.choice(ROOMS), rng.randrange(15, 27)
    text = rng.choice(
        (
            f"Set the {room} to {degrees} degrees.",
            f"Make it {degrees} degrees in the {room}.",
            f"{degrees} degrees in the {room}, please",
        )
    )
    return text, {"command": "climate", "room": room, "degrees": degrees}


def _status(rng: random.Random) -> tuple[str, Command]:
    machine = rng.choice(MACHINES)
    what, words = rng.choice(
        (("disk", "disk space"), ("temperature", "temperature"), ("memory", "memory"))
    )
    text = rng.choice(
        (
            f"How is the {words} on {machine}?",
            f"Show me the {words} of {machine}.",
            f"Check {machine}'s {words}",
        )
    )
    return text, {"command": "status", "what": what, "machine": machine}


KINDS: tuple[Callable[[random.Random], tuple[str, Command]], ...] = (
    _power,
    _service,
    _backup,
    _climate,
    _status,
)


def chats(seed: int = SEED, num_chats: int = NUM_CHATS) -> Iterator[dict[str, object]]:
    """Chats in a seeded order, no request twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < num_chats:
        text, command = rng.choice(KINDS)(rng)
        if text not in seen:
            seen.add(text)
            yield {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": json.dumps(command)},
                ]
            }


if __name__ == "__main__":
    for chat in chats():
        sys.stdout.write(json.dumps(chat) + "\n")
