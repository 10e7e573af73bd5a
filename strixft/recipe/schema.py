"""The schema of a recipe: each setting with its default, bounds and reason.

The docstring under a setting is its text in `strixft recipe --explain` and in the JSON schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from strixft.catalog.exports import KINDS, QUANTISATIONS
from strixft.catalog.hosts import known_host
from strixft.catalog.methods import METHODS
from strixft.catalog.trackers import TRACKERS
from strixft.formats.known_formats import FORMATS
from strixft.formats.messages import RESERVED
from strixft.recipe.section import Section, at_least, known, refuse
from strixft.recipe.servers import Augment, Judge
from strixft.support.tables import did_you_mean


def _known_columns(columns: dict[str, str]) -> dict[str, str]:
    known = {name for form in FORMATS.values() for s in form.shapes for name in s | form.optional}
    for name in columns:
        if name not in known:
            raise ValueError(
                f"{name!r} is not a column of a format; {did_you_mean(name, sorted(known))}"
            )
    return columns


def _layer_numbers(asked: Any) -> Any:
    """Return `16-31` as a list of numbers; anything else as it is."""
    found = (
        re.fullmatch(r"\s*(\d{1,4})\s*-\s*(\d{1,4})\s*", asked) if isinstance(asked, str) else None
    )
    return list(range(int(found[1]), int(found[2]) + 1)) if found else asked


Format = Annotated[str, AfterValidator(lambda name: name if name == "auto" else FORMATS[name].name)]

Columns = Annotated[dict[str, str], AfterValidator(_known_columns)]

Metric = Literal[
    "loss", "exact_match", "json_valid", "json_equal", "number", "pattern", "chrf", "rouge_l"
]


class Source(Section):
    """One of several sources of rows."""

    source: str
    """File, folder, glob pattern, or data set on the hub."""
    weight: float = Field(default=1, gt=0)
    """Uses of each row in one epoch: 2 uses every row twice, 0.5 uses half of the rows."""
    split: str = "train"
    """Split of a data set on the hub."""
    format: Format | None = None
    """Format of its rows, if it differs from `dataset.format`."""
    columns: Columns | None = None
    """Names of its columns, if they differ from `dataset.columns`."""


class Dataset(Section):
    """The source of the rows, and the part of them to train on."""

    source: Annotated[str | list[Source], refuse(lambda one: one == [], "names nothing to read")]
    """File, folder or glob pattern, relative to the recipe's file or, where it is typed, to the
    working folder; a data set on the hub; or a list of `{source, weight}`."""
    format: Format = "auto"
    """Format of a row; `auto` detects it from the columns."""
    columns: Columns = Field(default={})
    """Our name of a column → its name in the data, or a dotted path into it."""
    ignore: list[str] = Field(default=[])
    """Keys of rows, messages and calls to leave out, wherever they occur."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens that count in the loss: every assistant turn, only the last one, or the whole text."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Variables of the chat template, such as `enable_thinking: false`, for all rows, evaluation
    and chat; a row's own `chat_template_kwargs` come first."""
    max_length: int = Field(default=4096, ge=8, le=2**20)
    """Longest row in tokens."""
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    """Treatment of longer rows; only `truncate` trains on answers that lost their end."""
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """Fraction of bad rows that may be left out, with a report; with more, the stage fails."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Treatment of rows with exactly the same content as an earlier row."""
    near_duplicates: Literal["ignore", "report", "drop"] = "ignore"
    """Treatment of rows that share most of their words with an earlier row."""
    personal_data: Literal["report", "mask", "drop"] = "report"
    """Treatment of text that looks like a key, an e-mail address or a phone number."""
    packing: bool = True
    """Put several chats into one row of `max_length`; no chat sees another."""
    group_by: str | None = None
    """Column whose rows stay on one side of the split; `question` keeps rows with the same question
    together."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of rows held out for evaluation, chosen by a hash of their content."""
    augment: Augment | None = None
    """Additional training rows that a server writes."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_the_rows_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in RESERVED & value.keys():
            raise ValueError(f"{name!r} is set for each row")
        return value

    def sources(self) -> list[str]:
        """Return the sources by name, one or several."""
        several = self.source if isinstance(self.source, list) else []
        return [one.source for one in several] or [str(self.source)]


class Lora(Section):
    """The adapter; ignored by `method: full`."""

    r: int = Field(default=16, ge=1)
    """Rank: a higher rank learns more and costs more memory."""
    alpha: int = Field(default=32, ge=1)
    """Strength: the adapter's output is scaled by alpha / r."""
    rs: bool = False
    """Scale by alpha / √r instead, so that high ranks learn as fast (rsLoRA, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training; each takes a mask of its own."""
    target_modules: Annotated[
        Literal["all-linear"] | list[str],
        refuse(lambda names: not names, "should name at least one layer"),
    ] = "all-linear"
    """Modules that get an adapter; all linear layers learn best (arXiv:2305.14314)."""
    experts: Literal["none", "shared", "all"] = "shared"
    """Experts of a mixture that `all-linear` adapts: none; those that every token passes; or those
    that the router chooses, too, each with an adapter of its own: 20 to 50 times the weights."""
    layers: Annotated[
        Literal["all"] | list[Annotated[int, Field(ge=0)]],
        BeforeValidator(_layer_numbers),
        refuse(lambda layers: not layers, "should name at least one layer"),
    ] = "all"
    """Decoder layers that get an adapter, counted from 0: a list, or a range such as `16-31`."""
    modules_to_save: list[str] = Field(default=[])
    """Modules that are trained whole beside the adapter, such as `embed_tokens` and `lm_head`."""


class Train(Section):
    """The updates of the weights."""

    epochs: float = Field(default=2, gt=0)
    """Passes over the training rows; a fraction stops within a pass."""
    max_steps: Annotated[int | None, at_least(1)] = None
    """Updates of the run, in place of those of `epochs`; the rows are used as often as it takes."""
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    """Peak learning rate, reached after the warm-up."""
    lora_plus_ratio: float = Field(default=1.0, gt=0, le=1000)
    """Learning rate of an adapter's B, relative to that of its A (LoRA+, arXiv:2402.12354)."""
    tokens_per_update: Annotated[int | Literal["auto"], at_least(1)] = "auto"
    """Trained tokens in one update; `auto` aims at 200 updates in total."""
    micro_batch: Annotated[int | Literal["auto"], at_least(1)] = "auto"
    """Rows in one forward pass; of the plans within 0.5 % of the fastest, `auto` chooses the one
    with the least memory."""
    recompute: Annotated[int | Literal["auto", "none", "elementwise", "all"], at_least(0)] = "auto"
    """Number of layers whose activations are computed again in backward; `elementwise` recomputes
    norms and activation functions of all layers but no matrix product; `auto` follows the plan, and
    is elementwise if layers are compiled."""
    attention: str = "auto"
    """Attention backend; `auto` is the fastest that computes correctly on the device."""
    compile: Literal["auto", "layers", "none"] = "auto"
    """Compile the decoder layers into generated kernels; `auto` does so on a GPU for packed
    rows."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """AdamW with float32 masters: 12 bytes for a weight trained in bf16, 16 in float32;
    `adamw-8bit` keeps an adapter's moments in 8 bits: 10 (arXiv:2110.02861)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of the updates in which the learning rate rises, starting above zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    save_every_minutes: float = Field(default=30, gt=0)
    """Minutes between checkpoints: the most work that a crash can lose."""
    held_out_every: Annotated[int | Literal["auto"], at_least(0)] = "auto"
    """Updates between two losses on held-out rows and general texts; 0 switches them off. `auto`
    takes about 20 in at most 2 % of the time; rows that take longer are a fixed part of all."""
    early_stop: Annotated[int, at_least(0)] = 0
    """End the training after so many held-out losses without a new lowest one; 0 never does."""
    keep: Literal["last", "best"] = "last"
    """Weights that are evaluated and exported: the last, or those of the lowest held-out loss,
    which are in `train/best` either way."""
    trackers: Annotated[list[str], known(TRACKERS)] = Field(
        default=[],
        description=f"Programs that get the losses, too: {', '.join(TRACKERS)}; csv is"
        " `train/log.csv`. All but csv are packages of their own.",
    )
    seed: int = Field(default=0, ge=0)
    """Seed of the adapter's initial weights and of the order of rows."""

    @field_validator("keep")
    @classmethod
    def _has_losses(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("held_out_every") == 0 and (
            value == "best" or info.data.get("early_stop")
        ):
            raise ValueError("and early_stop need the held-out loss, and held_out_every is 0")
        return value


class Evaluate(Section):
    """Comparison of base and tuned model on the held-out rows."""

    metrics: Literal["auto"] | list[Metric] = "auto"
    """Metrics besides the loss; `auto` chooses them by the reference answers."""
    pattern: str = ".+"
    """Regular expression of the metric `pattern`: its match must equal that in the reference."""
    max_rows: int = Field(default=200, ge=1)
    """Number of held-out rows to answer; the loss uses all of them."""
    prompts: Annotated[
        list[str] | str,
        refuse(
            lambda prompts: isinstance(prompts, list) and not all(map(str.strip, prompts)),
            "holds an empty prompt",
        ),
    ] = Field(default=[])
    """Your own prompts, answered by base and tuned model side by side: a list, or a text file with
    one prompt a line, relative to the recipe's file."""
    prompt_answer_tokens: int = Field(default=256, ge=1, le=2**16)
    """Longest answer to one of these prompts, in tokens."""
    tasks: list[str] = Field(default=[])
    """Tasks of lm-eval by name, such as `arc_easy`; needs the extra `eval`."""
    task_rows: int = Field(default=200, ge=1)
    """Most rows of each task."""
    task_folder: str | None = None
    """Folder with your own lm-eval tasks (YAML), relative to the recipe's file."""
    judge: Judge | None = None
    """A model that compares the answers of base and tuned model."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern


class Export(Section):
    """Forms of the result for servers."""

    to: Annotated[list[str], known(KINDS)] = Field(
        default=[],
        description=f"Kinds of export ({', '.join(KINDS)}); an empty list skips the stage.",
    )
    gguf: Annotated[
        list[str],
        refuse(lambda kinds: not kinds, "should name at least one quantisation"),
        known(QUANTISATIONS),
    ] = Field(default=["f16", "q8_0"])
    """Storage of the weights in GGUF files; each file is compared with the trained model."""


class Memory(Section):
    """The machine whose memory the run must fit."""

    host: Annotated[str, AfterValidator(known_host)] = "auto"
    """This machine (`auto`), its CPU alone (`cpu`), or a row of the host table."""
    reserve_gib: float = Field(default=16, ge=0)
    """GiB that the host keeps for itself if device and host share memory."""


_NOTIFIED = re.compile(r"desktop|(ntfy|webhook):(https?://|\$\w)\S+|command:.*\S.*")


class Recipe(Section):
    """One run, complete."""

    model: str
    """Hub id, folder (relative to the recipe's file), or `embedded:smollm2-135m`."""
    method: Annotated[str, AfterValidator(lambda name: METHODS[name].name)] = Field(
        default="lora", description=f"Training method: {', '.join(METHODS)}."
    )
    dataset: Dataset
    thinking: Literal["train", "keep", "drop"] = "train"
    """Reasoning before answers: `train` counts it in the loss, since a model that reasons has to
    write it; `keep` shows it and counts only what follows it; `drop` removes it from the rows. The
    empty reasoning that some templates write for an answer without any is trained by `train` and
    `drop`, so that the model learns to answer at once, and not by `keep`."""
    init_from: str | None = None
    """Run whose adapter is trained on, such as `runs/first`: the same base, and the same `lora`."""
    lora: Lora = Lora()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    memory: Memory = Memory()
    notify: Annotated[
        list[str],
        refuse(
            lambda targets: not all(map(_NOTIFIED.fullmatch, targets)),
            "should hold desktop, ntfy:URL, webhook:URL or command:WORDS, it is {}",
        ),
    ] = Field(default=[])
    """Receivers of a message when the run is done, has failed or was stopped: `desktop`,
    `ntfy:https://ntfy.sh/TOPIC`, `webhook:$URL` (JSON for Slack, Discord or your own),
    `command:WORDS` (with `STRIXFT_RUN`, `STRIXFT_STATE`, `STRIXFT_TEXT`). `$NAME` is a variable of
    the environment: an address that is a secret stays out of the recipe."""
    offline: bool = False
    """Never use the network; anything that is not on disk is an error."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; set it to `true` only after reading the code."""

    @field_validator("thinking")
    @classmethod
    def _has_a_part_to_keep(cls, value: str, info: ValidationInfo) -> str:
        dataset = info.data.get("dataset")
        if value == "keep" and dataset is not None and dataset.loss_on == "all":
            raise ValueError("should be train or drop where loss_on is all, it is 'keep'")
        return value

    @field_validator("offline")
    @classmethod
    def _sends_nothing(cls, value: bool, info: ValidationInfo) -> bool:
        sent = [one for one in info.data.get("notify", []) if one.startswith(("ntfy", "webhook"))]
        if value and sent:
            raise ValueError(f"is true, and notify would send to {sent[0].partition(':')[0]}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the complete recipe as plain data."""
        return self.model_dump(mode="json")


def as_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds or may hold; None for a plain setting."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def explain(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield each setting: dotted key, default, reason."""
    for name, field in model.model_fields.items():
        section, reason = as_section(field.annotation), " ".join((field.description or "").split())
        if section and not field.is_required() and field.default is None:
            yield f"{prefix}{name}", "null", reason
        if section:
            yield from explain(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.default)
            yield f"{prefix}{name}", default, reason
