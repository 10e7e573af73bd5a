"""The recipe's sections that name a model behind a server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from strixft.recipe.section import Section
from strixft.support.errors import HostError


class Server(Section):
    """A model behind a server with the OpenAI protocol."""

    server: str
    """Address of a server: Lemonade, FastFlowLM, llama.cpp, Ollama, vLLM or similar."""
    model: str | None = None
    """The server's name for the model; not needed if it has one model, or one for the NPU."""
    timeout_s: float = Field(default=120, gt=0, le=3600)
    """Longest time for one answer in seconds, including the time to load the model."""
    max_tokens: int = Field(default=1024, ge=16, le=2**16)
    """Longest answer in tokens, including reasoning."""

    @field_validator("server")
    @classmethod
    def _is_address(cls, address: str) -> str:
        from strixft.support.http import base_url  # httpx: not for recipes without a server

        try:
            return base_url(address)
        except HostError as error:
            raise ValueError(f"{error.problem}; a key goes into STRIXFT_API_KEY") from None


class Judge(Server):
    """A model that decides which of two answers is better."""

    rubric: str = (
        "The better answer is right and does what the request asks. Of two right answers the better"
        " one is complete, has the form that the reference has, and says nothing else."
    )
    """Instructions for the judge: the properties of a better answer."""
    max_rows: int = Field(default=50, ge=1)
    """Number of held-out rows to judge; each pair of answers is judged in both orders."""


class Augment(Server):
    """Rows that a server writes from training rows; held-out rows are never sent."""

    enabled: bool = False
    """Write these rows and train on them; `strixft prepare --augment` sets it."""
    task: Literal["paraphrase", "answer", "write"] = "paraphrase"
    """`paraphrase` rewords the request and keeps the answer; `answer` writes a new answer; `write`
    makes a new request and answer similar to the row's."""
    instruction: str | None = None
    """Additional instruction for the server, such as a language or a tone."""
    per_row: int = Field(default=1, ge=1, le=100)
    """New rows to request for each training row."""
    max_rows: int = Field(default=200, ge=1)
    """Number of training rows to send; the seed chooses them."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Sampling temperature; higher values make the new rows of one training row differ more."""
