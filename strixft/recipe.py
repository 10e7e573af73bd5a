"""The recipe: what one run does, as a YAML file checked before anything else happens.

Unknown keys are refused, all faults are reported together, and every setting has one docstring,
from which `strixft recipe --explain` and `--schema` are made.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from strixft import sources
from strixft.errors import FIX, HostError, RecipeError
from strixft.exports import KINDS, QUANTISATIONS
from strixft.formats import FORMATS
from strixft.hardware import known_host
from strixft.methods import METHODS
from strixft.servers import base_url
from strixft.tables import did_you_mean

HERE = Path(__file__).resolve().parent
LARGEST = 2**31 - 1
"""Largest number that a recipe may hold."""
NEAR = 0.8
"""How alike two names of settings are that are taken for one, 0 to 1."""
SHOWN_FAULTS = 20


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
            raise ValueError(f"should be {LARGEST} or less, it is {_shown(value)}")
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"should be text, it is {_shown(value)}")
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


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML whose keys are text and stand once; a date is text."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        problem = None
        if key.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
            problem = "a key should be text; a number, a list or a merge (<<) is none"
        elif key.value in seen:
            problem = f"the key {key.value!r} stands twice"
        if problem:
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.yaml_implicit_resolvers = {
    first: [row for row in rows if row[0] != "tag:yaml.org,2002:timestamp"]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, *, name: str, fix: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(text for text in (error.context, error.problem) if text)
        raise RecipeError(f"{name}{where}: {problem}", fix=fix) from error
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply", fix=fix) from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name} is not YAML: {error}", fix=fix) from error


def _parents(start: Path) -> Iterator[Path]:
    yield from (start, *start.parents)


def workspace(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds `recipes/`, or the start itself."""
    start = (start or Path.cwd()).resolve()
    return next((folder for folder in _parents(start) if (folder / "recipes").is_dir()), start)


def shipped(kind: Literal["recipes", "notebooks"]) -> Path:
    """Folder of the recipes or notebooks that came with the package or its repository."""
    return next(folder for folder in (HERE / kind, HERE.parent / kind) if folder.is_dir())


def find_recipes() -> dict[str, Path]:
    """Recipes by name: those of the workspace first, then those that ship."""
    folders = (shipped("recipes"), workspace() / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The recipe file that a name or a path means.

    Raises:
        RecipeError: There is no such recipe.
    """
    given = Path(os.path.expanduser(name_or_path))
    for path in (given, workspace() / given, shipped("recipes").parent / given):
        if os.path.isfile(path):  # Path.is_file raises where a name is too long
            return path.resolve()
    known = find_recipes()
    if str(name_or_path) in known:
        return known[str(name_or_path)].resolve()
    if str(name_or_path) and os.path.isdir(given):
        raise RecipeError(
            f"{given} is a folder, not a recipe", fix="name a file   strixft recipe   lists them"
        )
    raise RecipeError(
        f"there is no recipe {str(name_or_path)!r} (looked from {Path.cwd()})",
        fix=f"{did_you_mean(given.stem, known)}   strixft recipe   lists them",
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a recipe file as they stand there.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or holds no settings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})", fix=f"save {path} as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", fix=f"ls -l {path}   shows whose it is"
        ) from error
    data = _parse_yaml(text, name=str(path), fix=f"correct {path}")
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no settings", fix="strixft recipe demo   shows one")
    return data


def parse_override(text: str) -> tuple[str, Any]:
    """`train.learning_rate=2e-4` as key and value.

    >>> parse_override("train.epochs=3")
    ('train.epochs', 3)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {_shown(text)} has no key or no '='", fix="--set train.learning_rate=2e-4"
        )
    name = f"--set {_shown(text)}"
    return key.strip(), _parse_yaml(value, name=name, fix="put the value in quotes")


def parse_overrides(overrides: object) -> dict[str, Any]:
    """Overrides of a notebook: a mapping of dotted keys, or its JSON text (papermill's `-p`).

    Raises:
        RecipeError: They are neither.
    """
    fix = """-p overrides '{"train.learning_rate": 2e-4}'"""
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"overrides are not JSON: {error}", fix=fix) from error
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise RecipeError(
            f"overrides should be a mapping of dotted keys, they are {_shown(overrides)}", fix=fix
        )
    return dict(overrides)


def _override(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(data)
    for dotted, value in overrides.items():
        *sections, last = str(dotted).split(".")
        if not all((*sections, last)):
            raise RecipeError(
                f"{dotted!r} is not a dotted key", fix="--set train.learning_rate=2e-4"
            )
        place: Any = result
        for section in sections:
            if place.get(section) is None:  # `judge: null` is a section that is not there yet
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise RecipeError(
                    f"{dotted}: {section!r} is not a section", fix="strixft recipe --explain"
                )
        both = isinstance(value, Mapping) and isinstance(place.get(last), Mapping)
        place[last] = {**place[last], **value} if both else value
    return result


WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:.12g}",
    "greater_than_equal": "{ge:.12g} or more",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "{le:.12g} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a section",
    "string_type": "text",
}
"""pydantic's name of a fault → what would be right."""


def _shown(value: object) -> str:
    """A value in few words; a list or a section may be huge behind YAML's anchors."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return "empty" if value is None else text if len(text) <= 60 else f"{text[:60]}…"


def _as_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold; None of a plain setting."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


def _section(section: Any, key: str | int) -> Any:
    """The section behind a key of a section; None where there is a plain setting or nothing."""
    field = section.model_fields.get(key) if section else None
    return _as_section(field.annotation) if field else None


def _items(section: Any, key: str | int) -> Any:
    """The section of which a key of a section holds a list; None where it holds none."""
    field = section.model_fields.get(key) if section else None
    lists = [kind for kind in get_args(field.annotation) if get_args(kind)] if field else []
    return next((found for kind in lists if (found := _as_section(get_args(kind)[0]))), None)


def _walk(location: Sequence[str | int]) -> tuple[list[str], Any]:
    """Keys and indices on the way to a setting, and the section that the last is looked up in.

    The branch of a union, which pydantic adds, is no part of the way.
    """
    inner: Any = Recipe
    section = items = None
    parts = []
    for part in location:
        if inner or isinstance(part, int):
            parts.append(str(part))
        section, items = inner, _items(inner, part) or items
        inner = items if isinstance(part, int) else _section(section, part)
    return parts, section


def _place(location: Sequence[str | int]) -> str:
    """Dotted key, and the index of a list."""
    return ".".join(_walk(location)[0])


def _near_setting(location: Sequence[str | int]) -> str:
    word, (_, section) = location[-1], _walk(location)
    elsewhere = [key for key, *_ in explain() if key.endswith(f".{word}")]
    if elsewhere and not get_close_matches(str(word), section.model_fields, cutoff=NEAR):
        return f"did you mean {elsewhere[0]!r}?"
    return did_you_mean(str(word), section.model_fields)


def _fault(place: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """One fault as text; a union has one error for each of its branches."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"{place}: there is no such setting; {_near_setting(first['loc'])}"
    if first["type"] == "missing":
        return f"{place}: is missing"
    if first["type"] not in WANTED:
        text = first["msg"].removeprefix("Value error, ").replace(FIX, "; ")
        return f"{place}: {text}"
    wanted = [WANTED[row["type"]].format_map(row.get("ctx", {})) for row in errors]
    return f"{place}: should be {' or '.join(wanted)}, it is {_shown(first['input'])}"


def _faults(error: ValidationError) -> list[str]:
    by_place: dict[str, list[Mapping[str, Any]]] = {}
    for row in error.errors(include_url=False):
        by_place.setdefault(_place(row["loc"]), []).append(row)
    # a list's item says more than the list
    outer = {place[:end] for place in by_place for end, sign in enumerate(place) if sign == "."}
    return [_fault(place, rows) for place, rows in by_place.items() if place not in outer]


def check_recipe(data: Mapping[str, Any], *, name: str) -> Recipe:
    """A recipe from plain data.

    Args:
        data: The settings.
        name: What to call it in errors, usually the file.

    Raises:
        RecipeError: With every fault found.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = _faults(error)
        listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
        more = len(faults) - SHOWN_FAULTS
        rest = f"\n  … and {more} more" if more > 0 else ""
        noun = "fault" if len(faults) == 1 else "faults"
        raise RecipeError(
            f"{name} has {len(faults)} {noun}:{listed}{rest}",
            fix="strixft recipe --explain   shows every setting",
        ) from None


def _located(source: str | list[Source], folder: Path) -> str | list[Source]:
    """Sources as absolute paths or ids of the hub."""
    if isinstance(source, str):
        return sources.resolve(source, folder)
    return [
        one.model_copy(update={"source": sources.resolve(one.source, folder)}) for one in source
    ]


def _model(name: str, folder: Path) -> str:
    """A model's folder as an absolute path: beside the recipe, or where the command is typed.

    What can only be a path starts at the recipe, there or not; other names may be the hub's.
    """
    places = [place / os.path.expanduser(name) for place in (folder, Path.cwd())]
    found = [place for place in places if os.path.isdir(place)]
    if not found and name.startswith(("./", "../", "~")):
        found = places
    return os.path.realpath(found[0]) if found else name


def _prompts(prompts: list[str] | str, folder: Path) -> list[str]:
    """Prompts as a list: a file's lines become part of the recipe."""
    if not isinstance(prompts, str):
        return prompts
    path = folder / Path(prompts).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"evaluate.prompts: {path} cannot be read: {getattr(error, 'strerror', error)}",
            fix="evaluate.prompts: a text file with one prompt a line, or a list of prompts",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _evaluation(asked: Evaluate, folder: Path) -> Evaluate:
    """The section with its files found.

    Raises:
        RecipeError: One is not there.
    """
    tasks = asked.task_folder
    if tasks is not None:
        tasks = str((folder / Path(tasks).expanduser()).resolve())
        if not os.path.isdir(tasks):
            raise RecipeError(
                f"evaluate.task_folder: {tasks} is no folder",
                fix="evaluate.task_folder: a folder that holds YAML files of lm-eval",
            )
    return asked.model_copy(
        update={"prompts": _prompts(asked.prompts, folder), "task_folder": tasks}
    )


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe file, checked, with overrides put in and its data file found.

    Args:
        name_or_path: `demo`, `recipes/demo.yaml` or any path.
        overrides: Values by dotted key, such as `{"train.learning_rate": 2e-4}`.

    Raises:
        RecipeError: No such file, not YAML, or settings that do not describe a run.
    """
    path = find_recipe(name_or_path)
    recipe = check_recipe(_override(read_settings(path), overrides or {}), name=str(path))
    source = _located(recipe.dataset.source, path.parent)
    here = Path.cwd() if "model" in (overrides or {}) else path.parent
    return recipe.model_copy(
        update={
            "model": _model(recipe.model, here),
            "dataset": recipe.dataset.model_copy(update={"source": source}),
            "evaluate": _evaluation(recipe.evaluate, path.parent),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML."""
    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{dotted}.") if nested else {dotted: value}
    return flat


def explain(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each setting: dotted key, default, reason."""
    for name, field in model.model_fields.items():
        section = _as_section(field.annotation)
        if section and not field.is_required() and field.default is None:
            yield f"{prefix}{name}", "null", " ".join((field.description or "").split())
        if section:
            yield from explain(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.default)
            yield f"{prefix}{name}", default, " ".join((field.description or "").split())
