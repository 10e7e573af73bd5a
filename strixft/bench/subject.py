"""`Subject`: what generates, in process or behind a server, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from strixft.bench.generation import Backend
from strixft.bench.weights import WEIGHTS, read_bytes
from strixft.catalog.hosts import HOSTS, Host
from strixft.support.errors import RecipeError

LOCAL = ("localhost", "127.0.0.1", "::1")

DEFAULT_MODEL = "embedded:smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What generates.

    Args:
        model: Hub id, folder, embedded model; or as the server calls it.
        recipe: A recipe: its model, stored as its method does.
        run: A run: its base, with the adapter, and merged.
        server: Address of a server, such as localhost:8080 (Lemonade 13305, Ollama 11434).
        api: Of that server: openai or ollama; auto asks it.
        method: How weights are stored in process: qlora for 4 bit.
        weights: Which model it is, for the ceiling of a server's: gpt-oss-120b, Qwen3 8B, …
        quantisation: Of the server's model, for the ceiling: Q4_K_M, MXFP4, …
        file_gb: Size of its file in 10⁹ bytes, instead of quantisation.
        host: Where the server runs, for the ceiling: auto is this machine if it is local.
    """

    model: str = ""
    recipe: str = ""
    run: str = ""
    server: str = ""
    api: str = "auto"
    method: str = "lora"
    weights: str = ""
    quantisation: str = ""
    file_gb: float = 0.0
    host: str = "auto"

    def backends(self) -> Iterator[Backend]:
        """One after the other; those in process share memory, so each ends with the next.

        Raises:
            RecipeError: More than one is named.
        """
        named = [key for key in ("server", "run", "recipe") if getattr(self, key)]
        if len(named) > 1:
            fix = f"keep one of --{' --'.join(named)}"
            raise RecipeError(f"{' and '.join(named)} cannot be measured at once", fix=fix)
        if self.server:
            yield self._served()
            return
        yield from self._in_process()

    def _in_process(self) -> Iterator[Backend]:
        from strixft.bench.in_process import load_model, load_run
        from strixft.recipe.load import load_recipe

        if self.run:
            return load_run(self.run)
        if self.recipe:
            recipe = load_recipe(self.recipe)
            return load_model(recipe.model, recipe.method)
        return load_model(self.model or DEFAULT_MODEL, self.method)

    def _served(self) -> Backend:
        from strixft.bench.served import find_server

        return find_server(self.server, self.api, self.model, host=self._host(), **self._known())

    def _known(self) -> dict[str, Any]:
        if not self.weights:
            return {}
        weights = WEIGHTS[self.weights]
        if not (self.quantisation or self.file_gb):
            return {"weights": weights}
        read = read_bytes(weights, self.quantisation, self.file_gb or None)
        return {"weights": weights, "read_gb": read / 1e9}

    def _host(self) -> Host | None:
        if self.host != "auto":
            return HOSTS[self.host]
        address = self.server if "://" in self.server else f"http://{self.server}"
        if urlsplit(address).hostname not in LOCAL:
            return None
        from strixft.guard.host import find_host

        return find_host("auto")
