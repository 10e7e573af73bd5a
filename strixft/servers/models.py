"""The models of a server: list them, choose one, and tell where it runs."""

from __future__ import annotations

import ipaddress
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from strixft.run.open import find_runs
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import START_S, ask
from strixft.support.tables import did_you_mean
from strixft.support.units import format_gib

NPU = "flm"
"""Lemonade's `recipe` of a model on the NPU (lemonade-sdk/lemonade: docs/api/openai.md)."""

OLLAMA_TAG = ":latest"


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model as `GET /v1/models` lists it."""

    name: str
    recipe: str | None = None
    """Name of the engine that runs it, where the server tells, as Lemonade does."""
    num_bytes: int | None = None
    """Size of its file, where the server tells, as llama.cpp does."""

    @property
    def on_npu(self) -> bool | None:
        """Return whether it runs on the NPU; None where the server does not tell."""
        return None if self.recipe is None else self.recipe == NPU


def list_models(url: str) -> list[ListedModel]:
    """List the models that a server offers.

    Raises:
        HostError: No server answers, or it lists none.
    """
    rows = ask(f"{url}/v1/models", timeout=START_S).get("data")
    found = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and "id" in row:
            recipe, meta = row.get("recipe"), row.get("meta")
            size = meta.get("size") if isinstance(meta, dict) else None
            found.append(
                ListedModel(
                    str(row["id"]),
                    recipe if isinstance(recipe, str) else None,
                    size if isinstance(size, int) else None,
                )
            )
    if not found:
        raise _no_models(url)
    return found


def _no_models(url: str) -> HostError:
    return HostError(f"{url} lists no model", fix="load or pull one, then run the command again")


def choose_name(url: str, asked: str | None, known: Sequence[str], setting: str) -> str:
    """Return the name of the model asked for, or of the only one.

    Args:
        url: The server's, for errors.
        asked: Name that the user gives.
        known: Names that the server lists.
        setting: Text to type before a name, such as `--model`.

    Raises:
        HostError: There is none.
        RecipeError: There is no such model, or none is asked for and there are several.
    """
    if not known:
        raise _no_models(url)
    if not asked and len(known) == 1:
        return known[0]
    same = [name for name in known if asked in (name, name.removesuffix(OLLAMA_TAG))]
    if same:
        return same[0]
    fix = did_you_mean(asked, known) if asked else f"{setting} one of: {', '.join(known)}"
    raise RecipeError(
        f"{url} has no model {asked!r}" if asked else f"{url} has several models", fix=fix
    )


def find_model(url: str, asked: str | None, setting: str) -> ListedModel:
    """Find the model asked for, the only one, or the only one for the NPU.

    Raises:
        HostError: No server answers, or it has no model.
        RecipeError: There is no such model, or none is asked for and there are several.
    """
    found = {model.name: model for model in list_models(url)}
    on_npu = [name for name, model in found.items() if model.on_npu]
    known = on_npu if not asked and len(on_npu) == 1 else list(found)
    return found[choose_name(url, asked, known, setting)]


def is_local(url: str) -> bool:
    """Return whether the server runs on this machine.

    >>> is_local("http://localhost:13305"), is_local("http://[::1]:80"), is_local("http://10.1.2.3")
    (True, True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host in ("localhost", platform.node().lower())


def memory_warning(url: str, model: ListedModel) -> list[str]:
    """Warn of the memory that a model takes from a training run on the same machine.

    Args:
        url: Address of its server.
        model: One of its models.

    Returns:
        One warning, or none for the NPU and for other machines.
    """
    if model.on_npu or not is_local(url):
        return []
    takes = "does not say what runs it, so it may take" if model.on_npu is None else "takes"
    size = "" if model.num_bytes is None else f" ({format_gib(model.num_bytes)} and more)"
    states = [(run.name, run.status()) for run in find_runs()]
    busy = [
        name
        for name, status in states
        if (status.get("stage"), status.get("state")) == ("train", "running")
    ]
    told = f"; in training now: {', '.join(busy)}" if busy else ""
    return [
        f"{model.name} on {url} {takes} GPU memory{size} from a run that is trained on this machine"
        f" at the same time{told}. A model with recipe {NPU} runs on the NPU."
    ]
