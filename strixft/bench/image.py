"""Images from a server: seconds for each image and each step; the images are kept."""

from __future__ import annotations

import base64
import binascii
import re
import struct
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from strixft.bench.backends import find_model
from strixft.bench.run import Bench, BenchRow
from strixft.bench.timing import columns
from strixft.catalog.device_rates import data_folder
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import ask, base_url

NOT_PUBLISHED = "No measured time of Z-Image-Turbo on gfx1151 was found published."


class Image(Bench):
    """Time images of /v1/images/generations.

    No time of Z-Image-Turbo on gfx1151 is published.
    """

    server: str = Field(
        "localhost:13305",
        description="Lemonade 13305, sd-server 1234; to compare: vulkan=localhost:1234,"
        "rocm=box:1235.",
    )
    model: str = Field("", description="The server's name for it; Z-Image-Turbo on Lemonade.")
    prompt: str = Field(
        "a lighthouse on a cliff at dusk, oil painting", description="Subject of the image."
    )
    size: str = Field("512x512", description="Width x height.")
    steps: int = Field(
        0, ge=0, description="Steps asked for; 0 leaves them to the server, without a time a step."
    )
    repeat: int = Field(3, ge=1, description="Images, after one to warm up.")
    folder: str = Field("", description="Folder for images; empty: images in the data folder.")

    def measure(self) -> list[BenchRow]:
        """Time images of one server or several.

        Raises:
            RecipeError: The size is not width x height.
        """
        if not re.fullmatch(r"\d+x\d+", self.size):
            raise RecipeError(f"{self.size!r} is not the size of an image", fix="--size 512x512")
        folder = Path(self.folder).expanduser() if self.folder else data_folder() / "images"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, word in enumerate(self.server.split(","), start=1):
            name, named, address = word.strip().rpartition("=")
            name = re.sub(r"\W", "-", name) if named else f"server-{number}"
            rows.append(self._row(name, base_url(address), folder))
        return rows

    def _row(self, name: str, url: str, folder: Path) -> BenchRow:
        body: dict[str, Any] = {
            "model": find_model(url, self.model),
            "prompt": self.prompt,
            "size": self.size,
            "n": 1,  # Lemonade allows no more
            "response_format": "b64_json",
            **({"steps": self.steps} if self.steps else {}),
        }
        _image(url, {**body, "seed": 0})  # loads the model
        stamp, taken, size = datetime.now(UTC).strftime("%Y%m%dT%H%M%S"), list[float](), ""
        for seed in range(1, self.repeat + 1):
            image, seconds = _image(url, {**body, "seed": seed})
            size = image_size(image)
            (folder / f"{name}-{stamp}-{seed}.png").write_bytes(image)
            taken.append(seconds)
        figures = columns("seconds", taken)
        return {
            "backend": name,
            "model": body["model"],
            "server": url,
            "size": size,
            "steps": self.steps or None,
            **figures,
            "seconds_per_step": figures["seconds"] / self.steps if self.steps else None,
            "pictures": str(folder),
        }


def _image(url: str, body: dict[str, Any]) -> tuple[bytes, float]:
    """Ask for one image and return it with the seconds it took."""
    start = time.perf_counter()
    answer = ask(f"{url}/v1/images/generations", body)
    seconds = time.perf_counter() - start
    try:
        return base64.b64decode(answer["data"][0]["b64_json"], validate=True), seconds
    except (KeyError, IndexError, TypeError, binascii.Error) as error:
        raise HostError(
            f"{url} answers without an image in data[0].b64_json",
            fix="a server with response_format b64_json: Lemonade, sd-server",
        ) from error


def image_size(image: bytes) -> str:
    """Return width x height of a PNG; other formats are not measured.

    Raises:
        HostError: It is not an image.
    """
    if image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 24:
        return "{}x{}".format(*struct.unpack(">II", image[16:24]))
    if image.startswith((b"\xff\xd8", b"RIFF")):
        return "not PNG"
    raise HostError("the server sent bytes that are not an image", fix="look at the server's log")
