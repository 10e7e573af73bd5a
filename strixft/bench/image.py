"""Images of a server: seconds each, and a step; the pictures are kept."""

from __future__ import annotations

import base64
import binascii
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from strixft.bench.result import Row
from strixft.bench.served import find_model
from strixft.bench.timing import Sample
from strixft.catalog.rates import data_folder
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import ask, base_url

PNG = b"\x89PNG\r\n\x1a\n"

PROMPT = "a lighthouse on a cliff at dusk, oil painting"

NOT_PUBLISHED = "No measured time of Z-Image-Turbo on gfx1151 was found published."


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to draw."""

    model: str
    prompt: str
    size: str
    steps: int

    def body(self, seed: int) -> dict[str, object]:
        """The request; one picture each, as Lemonade allows no more."""
        more = {"steps": self.steps} if self.steps else {}
        return {
            "model": self.model,
            "prompt": self.prompt,
            "size": self.size,
            "n": 1,
            "response_format": "b64_json",
            "seed": seed,
            **more,
        }


def _picture(url: str, order: Order, seed: int) -> tuple[bytes, float]:
    start = time.perf_counter()
    answer = ask(f"{url}/v1/images/generations", order.body(seed))
    seconds = time.perf_counter() - start
    try:
        picture = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
    except (KeyError, IndexError, TypeError, binascii.Error) as error:
        raise HostError(
            f"{url} answers without a picture in data[0].b64_json",
            fix="a server with response_format b64_json: Lemonade, sd-server",
        ) from error
    return picture, seconds


def picture_size(picture: bytes) -> str:
    """Width × height of a PNG; other kinds are not measured.

    Raises:
        HostError: It is no picture.
    """
    if picture.startswith(PNG) and len(picture) > 24:
        return "{}x{}".format(*struct.unpack(">II", picture[16:24]))
    if picture.startswith((b"\xff\xd8", b"RIFF")):
        return "not PNG"
    raise HostError("the server sent bytes that are no picture", fix="look at the server's log")


def _measure(name: str, url: str, order: Order, repeat: int, folder: Path) -> Row:
    _picture(url, order, 0)  # loads the model
    stamp, seconds, size = datetime.now(UTC).strftime("%Y%m%dT%H%M%S"), [], ""
    for seed in range(1, repeat + 1):
        picture, took = _picture(url, order, seed)
        size = picture_size(picture)
        (folder / f"{name}-{stamp}-{seed}.png").write_bytes(picture)
        seconds.append(took)
    found = Sample(tuple(seconds))
    return {
        "backend": name,
        "model": order.model,
        "server": url,
        "size": size,
        "steps": order.steps or None,
        "seconds": found.median,
        "spread": found.spread,
        "repeats": repeat,
        "seconds_per_step": found.median / order.steps if order.steps else None,
        "pictures": str(folder),
    }


def _servers(text: str) -> Iterator[tuple[str, str]]:
    """Names and addresses of `vulkan=localhost:1234,rocm=localhost:1235`."""
    for number, word in enumerate(text.split(","), start=1):
        name, found, address = word.strip().rpartition("=")
        yield (re.sub(r"\W", "-", name) if found else f"server-{number}"), base_url(address)


def bench_image(
    server: str = "localhost:13305",
    model: str = "",
    prompt: str = PROMPT,
    size: str = "512x512",
    steps: int = 0,
    repeat: int = 3,
    folder: str = "",
) -> list[Row]:
    """Time pictures of /v1/images/generations; no time of Z-Image-Turbo on gfx1151 is published.

    Args:
        server: Lemonade 13305, sd-server 1234; to compare: vulkan=localhost:1234,rocm=box:1235.
        model: As the server calls it; Z-Image-Turbo on Lemonade.
        prompt: What to draw.
        size: Width x height.
        steps: Asked of the server, which may pass it over; 0: its own choice, no time a step.
        repeat: Pictures, after one to warm up.
        folder: Where pictures are kept; empty: images in the data folder.

    Raises:
        RecipeError: The size is none.
    """
    if not re.fullmatch(r"\d+x\d+", size):
        raise RecipeError(f"{size!r} is no size of a picture", fix="--size 512x512")
    target = Path(folder).expanduser() if folder else data_folder() / "images"
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, url in _servers(server):
        order = Order(model=find_model(url, "openai", model), prompt=prompt, size=size, steps=steps)
        rows.append(_measure(name, url, order, repeat, target))
    return rows
