"""The schema of a recipe: each setting with its default, bounds and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from strixft.catalog.exports import KINDS, QUANTISATIONS
from strixft.catalog.hosts import known_host
from strixft.catalog.methods import METHODS
from strixft.formats.table import FORMATS
from strixft.support.errors import HostError
from strixft.support.tables import did_you_mean

LARGEST = 2**31 - 1
"""Largest number that a recipe may hold."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:  # to Python, true is the number 1
            raise ValueError("should not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _in_bounds(cls, value: object) -> object:
        if isinstance(value, int | float) and abs(value) > LARGEST:
            raise ValueError(f"should be {LARGEST} or less, it is {shown(value)}")
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"should be text, it is {shown(value)}")
        return value


class Source(_Section):
    """One of several sources of rows."""

    source: str
    """File, folder, pattern of files, or data set of the hub."""
    weight: float = Field(default=1, gt=0)
    """Times that one pass takes the source's rows: 2 each twice, 0.5 half of them."""
    split: str = "train"
    """Which split of a data set of the hub."""
    format: str | None = None
    """Shape of its rows, where it differs from `dataset.format`."""
    columns: dict[str, str] | None = None
    """Names of its columns, where they differ from `dataset.columns`."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        return name if name in (None, "auto") else FORMATS[str(name)].name

    @field_validator("columns")
    @classmethod
    def _our_columns(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        return _check_columns(columns)


def _check_columns(columns: dict[str, str] | None) -> dict[str, str] | None:
    known = {name for form in FORMATS.values() for s in form.shapes for name in s | form.optional}
    for name in columns or {}:
        if name not in known:
            raise ValueError(
                f"{name!r} is no column of a format; {did_you_mean(name, sorted(known))}"
            )
    return columns


class Server(_Section):
    """A model behind a server that speaks the OpenAI protocol."""

    server: str
    """Address of a server: Lemonade, FastFlowLM, llama.cpp, Ollama, vLLM or like it."""
    model: str | None = None
    """As the server calls it; not needed where it has one model, or one for the NPU."""
    timeout_s: float = Field(default=120, gt=0, le=3600)
    """How long one answer may take, loading the model included."""
    max_tokens: int = Field(default=1024, ge=16, le=2**16)
    """Longest answer in tokens, reasoning included."""

    @field_validator("server")
    @classmethod
    def _is_address(cls, address: str) -> str:
        from strixft.support.http import base_url  # httpx: not for recipes without a server

        try:
            return base_url(address)
        except HostError as error:
            raise ValueError(f"{error.problem}; a key goes into STRIXFT_API_KEY") from None


class Judge(Server):
    """A model that says which of two answers is better."""

    rubric: str = (
        "The better answer is right and does what the request asks. Of two right answers the better"
        " one is complete, has the form that the reference has, and says nothing else."
    )
    """What makes an answer the better one."""
    max_rows: int = Field(default=50, ge=1)
    """Held-out rows that are judged, each in both orders."""


class Augment(Server):
    """Rows that a server writes from training rows; held-out rows are never sent."""

    enabled: bool = False
    """Write and train them; `strixft prepare --augment` sets it."""
    task: Literal["paraphrase", "answer", "write"] = "paraphrase"
    """`paraphrase` says a request otherwise and keeps its answer; `answer` answers anew; `write`
    makes a new request and answer like the row's."""
    instruction: str | None = None
    """What else the server is told, such as a language or a tone."""
    per_row: int = Field(default=1, ge=1, le=100)
    """Rows that are asked for each training row."""
    max_rows: int = Field(default=200, ge=1)
    """Training rows that are sent, chosen by the seed."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """How much the rows that are written for one training row differ."""


class Dataset(_Section):
    """Where the rows come from and what is trained of them."""

    source: str | list[Source]
    """File, folder or pattern, relative to the recipe's file; a data set of the hub; or a list of
    `{source, weight}`."""
    format: str = "auto"
    """Shape of a row: `auto` looks at the columns."""
    columns: dict[str, str] = Field(default={})
    """Our name of a column → its name in the data, or a dotted path into it."""
    ignore: list[str] = Field(default=[])
    """Keys of rows, messages and calls that are left out on purpose, wherever they stand."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens that count: every assistant turn, the last one only, or the whole text."""
    max_length: int = Field(default=4096, ge=8, le=2**20)
    """Longest row in tokens."""
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to longer rows; only `truncate` trains an answer that lost its end."""
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of bad rows that is left out with a report; more of them fail the stage."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to rows that say exactly what an earlier one says."""
    near_duplicates: Literal["ignore", "report", "drop"] = "ignore"
    """The same for rows that share most of their words with an earlier one."""
    personal_data: Literal["report", "mask", "drop"] = "report"
    """What happens to text that looks like a key, an e-mail address or a phone number."""
    packing: bool = True
    """Several chats in one row of `max_length`, none of which sees another."""
    group_by: str | None = None
    """A column whose rows stay on one side of the split; `question`: rows that ask the same."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of rows held out for evaluation, chosen by a hash of their content."""
    augment: Augment | None = None
    """More training rows, written by a server."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        return name if name == "auto" else FORMATS[name].name

    @field_validator("source")
    @classmethod
    def _some_source(cls, source: str | list[Source]) -> str | list[Source]:
        if not source:
            raise ValueError("names nothing to read")
        return source

    @field_validator("columns")
    @classmethod
    def _our_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        _check_columns(columns)
        return columns

    def sources(self) -> list[str]:
        """The sources by name, one or several."""
        several = self.source if isinstance(self.source, list) else []
        return [one.source for one in several] or [str(self.source)]


class Lora(_Section):
    """The adapter; ignored by `method: full`."""

    r: int = Field(default=16, ge=1)
    """Rank: more learns more and costs more memory."""
    alpha: int = Field(default=32, ge=1)
    """Strength: the adapter's output is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get an adapter; all linear ones learn best (arXiv:2305.14314)."""

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("should name at least one layer")
        return value


class Train(_Section):
    """How the weights are updated."""

    epochs: float = Field(default=2, gt=0)
    """Passes over the training rows; a fraction stops early."""
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    """Peak learning rate, reached after the warm-up."""
    tokens_per_update: int | Literal["auto"] = "auto"
    """Trained tokens in one update; `auto` aims at 200 updates in all."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows in one forward pass; `auto`: of plans as fast but for 0.5 %, the one of least memory."""
    recompute: int | Literal["auto", "none", "elementwise", "all"] = "auto"
    """Layers whose activations are computed again in backward; `elementwise` norms and activations
    of all, and no product; `auto` by the plan, and elementwise where layers are compiled."""
    attention: str = "auto"
    """How attention is computed; `auto` is the fastest that is right on the device."""
    compile: Literal["auto", "layers", "none"] = "auto"
    """Run decoder layers as generated kernels; `auto` does on a GPU where rows are packed."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW with float32 masters: 12 bytes for a weight that is trained in bf16, 16 in float32."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the updates in which the learning rate rises; the first one learns too."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    save_every_minutes: float = Field(default=30, gt=0)
    """Most work that a crash can lose."""
    seed: int = Field(default=0, ge=0)
    """Seed of adapter initialisation and row order."""

    @field_validator("tokens_per_update", "micro_batch", "recompute")
    @classmethod
    def _not_negative(cls, value: int | str, info: ValidationInfo) -> int | str:
        least = 0 if info.field_name == "recompute" else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"should be {least} or more, it is {value}")
        return value


class Evaluate(_Section):
    """Base against tuned on the held-out rows."""

    metrics: (
        Literal["auto"]
        | list[
            Literal[
                "loss",
                "exact_match",
                "json_valid",
                "json_equal",
                "number",
                "pattern",
                "chrf",
                "rouge_l",
            ]
        ]
    ) = "auto"
    """Measures besides the loss; `auto` looks at the references."""
    pattern: str = ".+"
    """Regular expression of the metric `pattern`: what it finds must be the reference's."""
    max_rows: int = Field(default=200, ge=1)
    """Held-out rows that are answered in full; the loss counts all of them."""
    prompts: list[str] | str = Field(default=[])
    """Prompts of your own, which base and tuned answer side by side: a list, or a text file with
    one a line, relative to the recipe's file."""
    prompt_answer_tokens: int = Field(default=256, ge=1, le=2**16)
    """Longest answer to one of them."""
    tasks: list[str] = Field(default=[])
    """Tasks of lm-eval by name, such as `arc_easy`; needs the extra `eval`."""
    task_rows: int = Field(default=200, ge=1)
    """Most rows of each task."""
    task_folder: str | None = None
    """Folder with lm-eval tasks of your own (YAML), relative to the recipe's file."""
    judge: Judge | None = None
    """A model that compares the answers of base and tuned."""

    @field_validator("prompts")
    @classmethod
    def _no_empty_prompt(cls, prompts: list[str] | str) -> list[str] | str:
        if isinstance(prompts, list) and not all(prompt.strip() for prompt in prompts):
            raise ValueError("holds an empty prompt")
        return prompts

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern


class Export(_Section):
    """What a server needs of the result."""

    to: list[str] = Field(default=[])
    """Kinds of export (merged, gguf, gguf-lora, ollama, lemonade, vllm); empty skips the stage."""
    gguf: list[str] = Field(default=["f16", "q8_0"])
    """How GGUF files store their weights; each is compared with the trained model."""

    @field_validator("to")
    @classmethod
    def _known_kinds(cls, kinds: list[str]) -> list[str]:
        return [KINDS[kind].name for kind in kinds]

    @field_validator("gguf")
    @classmethod
    def _known_quantisations(cls, kinds: list[str]) -> list[str]:
        if not kinds:
            raise ValueError("should name at least one quantisation")
        return [QUANTISATIONS[kind].name for kind in kinds]


class Memory(_Section):
    """Which machine the run must fit."""

    host: str = "auto"
    """This machine (`auto`), its CPU alone (`cpu`), or a row of the host table."""
    reserve_gib: float = Field(default=16, ge=0)
    """What the host keeps for itself where device and host share memory."""

    @field_validator("host")
    @classmethod
    def _known_host(cls, name: str) -> str:
        return known_host(name)


class Recipe(_Section):
    """One run, complete."""

    model: str
    """Hub id, folder (relative to the recipe's file), or `embedded:smollm2-135m`."""
    method: str = "lora"
    """What is trained: a row of the method table."""
    dataset: Dataset
    lora: Lora = Lora()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    memory: Memory = Memory()
    offline: bool = False
    """Never ask the network; what is not on disk is an error."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only `true` after somebody has read it."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return METHODS[name].name

    def to_dict(self) -> dict[str, Any]:
        """The complete recipe as plain data."""
        return self.model_dump(mode="json")


def shown(value: object) -> str:
    """A value in few words; a list or a section may be huge behind YAML's anchors."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return "empty" if value is None else text if len(text) <= 60 else f"{text[:60]}…"


def as_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold; None of a plain setting."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def explain(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each setting: dotted key, default, reason."""
    for name, field in model.model_fields.items():
        section = as_section(field.annotation)
        if section and not field.is_required() and field.default is None:
            yield f"{prefix}{name}", "null", " ".join((field.description or "").split())
        if section:
            yield from explain(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.default)
            yield f"{prefix}{name}", default, " ".join((field.description or "").split())
