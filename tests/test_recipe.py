"""A recipe is found, read and checked; every fault says where it is and what would be right."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import BaseModel

from strixft.recipe.find import find_recipe, find_recipes, workspace
from strixft.recipe.load import (
    check_recipe,
    dump_recipe,
    flatten,
    load_recipe,
    parse_override,
    parse_overrides,
    read_settings,
)
from strixft.recipe.schema import Recipe, explain
from strixft.recipe.section import LARGEST
from strixft.support.errors import RecipeError

LEAST = "model: m\ndataset: {source: rows.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a recipe file as it stands."""

    def write_file(content: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def faults_of(changes: dict[str, Any]) -> list[str]:
    """Faults of the smallest recipe with some settings changed, by dotted key."""
    data: dict[str, Any] = yaml.safe_load(LEAST)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    with pytest.raises(RecipeError) as caught:
        check_recipe(data, name="mine.yaml")
    return [line.strip() for line in caught.value.problem.splitlines()[1:]]


def refusal(path: Path) -> RecipeError:
    """Why a recipe file is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value


# Settings that do not exist.

UNKNOWN = {
    "modle": "modle: there is no such setting; did you mean 'model'?",
    "dataset.sorce": "dataset.sorce: there is no such setting; did you mean 'source'?",
    "dataset.augment.tasks": "dataset.augment.tasks: there is no such setting;"
    " did you mean 'task'?",
    "lora.aplha": "lora.aplha: there is no such setting; did you mean 'alpha'?",
    "train.learning_rat": "train.learning_rat: there is no such setting;"
    " did you mean 'learning_rate'?",
    "evaluate.metric": "evaluate.metric: there is no such setting; did you mean 'metrics'?",
    "evaluate.judge.rubrick": "evaluate.judge.rubrick: there is no such setting;"
    " did you mean 'rubric'?",
    "export.too": "export.too: there is no such setting; did you mean 'to'?",
    "memory.hosts": "memory.hosts: there is no such setting; did you mean 'host'?",
}


@pytest.mark.parametrize(("key", "fault"), UNKNOWN.items(), ids=UNKNOWN)
def test_a_misspelt_setting_names_the_near_one(key: str, fault: str) -> None:
    section = key.rpartition(".")[0]
    server = {f"{section}.server": "localhost"} if section.count(".") else {}
    assert faults_of({key: 1, **server}) == [fault]


def test_misspelt_settings_are_tried_in_every_section() -> None:
    sections = {key.rpartition(".")[0] for key, *_ in explain()}
    assert {key.rpartition(".")[0] for key in UNKNOWN} == sections


@pytest.mark.parametrize("key", ["learning_rate", "lora.learning_rate"])
def test_a_setting_in_the_wrong_section_names_the_right_one(key: str) -> None:
    assert faults_of({key: 1}) == [
        f"{key}: there is no such setting; did you mean 'train.learning_rate'?"
    ]


def test_a_setting_like_no_other_lists_those_of_its_section() -> None:
    assert faults_of({"lora.zzz": 1}) == [
        "lora.zzz: there is no such setting; choose one of: r, alpha, rs, dropout, target_modules,"
        " experts, layers, modules_to_save"
    ]


# Values that are wrong.

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lora.r": "big"}, "lora.r: should be a whole number, it is 'big'"),
    ({"lora.r": 1.5}, "lora.r: should be a whole number, it is 1.5"),
    ({"lora.r": None}, "lora.r: should be a whole number, it is empty"),
    ({"lora.r": [8]}, "lora.r: should be a whole number, it is a list"),
    ({"lora.r": {"a": 8}}, "lora.r: should be a whole number, it is a section"),
    ({"lora.r": True}, "lora.r: should not be true or false"),
    ({"lora.r": 0}, "lora.r: should be 1 or more, it is 0"),
    ({"lora.r": LARGEST + 1}, f"lora.r: should be {LARGEST} or less, it is {LARGEST + 1}"),
    (
        {"memory.reserve_gib": 1e308},
        f"memory.reserve_gib: should be {LARGEST} or less, it is 1e+308",
    ),
    ({"train.epochs": True}, "train.epochs: should not be true or false"),
    ({"train.epochs": "many"}, "train.epochs: should be a number, it is 'many'"),
    ({"train.epochs": 0}, "train.epochs: should be more than 0, it is 0"),
    ({"train.epochs": float("inf")}, "train.epochs: should be a finite number, it is inf"),
    (
        {"train.learning_rate": float("nan")},
        "train.learning_rate: should be a finite number, it is nan",
    ),
    ({"train.learning_rate": "nan"}, "train.learning_rate: should be a finite number, it is 'nan'"),
    ({"train.learning_rate": 1}, "train.learning_rate: should be less than 1, it is 1"),
    ({"train.warmup_fraction": -0.1}, "train.warmup_fraction: should be 0 or more, it is -0.1"),
    ({"train.warmup_fraction": 1}, "train.warmup_fraction: should be less than 1, it is 1"),
    (
        {"dataset.validation_fraction": -0.05},
        "dataset.validation_fraction: should be 0 or more, it is -0.05",
    ),
    (
        {"dataset.max_bad_fraction": 1.01},
        "dataset.max_bad_fraction: should be 1 or less, it is 1.01",
    ),
    (
        {"dataset.max_length": 200_000_000},
        "dataset.max_length: should be 1048576 or less, it is 200000000",
    ),
    ({"train.seed": -1}, "train.seed: should be 0 or more, it is -1"),
    (
        {"train.micro_batch": "atuo"},
        "train.micro_batch: should be a whole number or 'auto', it is 'atuo'",
    ),
    ({"train.micro_batch": 0}, "train.micro_batch: should be 1 or more, it is 0"),
    ({"train.micro_batch": True}, "train.micro_batch: should not be true or false"),
    ({"train.recompute": -1}, "train.recompute: should be 0 or more, it is -1"),
    (
        {"train.recompute": "some"},
        "train.recompute: should be a whole number or 'auto', 'none', 'elementwise' or 'all',"
        " it is 'some'",
    ),
    (
        {"train.schedule": "cosin"},
        "train.schedule: should be 'cosine', 'linear' or 'constant', it is 'cosin'",
    ),
    (
        {"lora.target_modules": "q_proj"},
        "lora.target_modules: should be 'all-linear' or a list, it is 'q_proj'",
    ),
    ({"lora.target_modules": []}, "lora.target_modules: should name at least one layer"),
    ({"lora.target_modules": [1]}, "lora.target_modules.0: should be text, it is 1"),
    (
        {"evaluate.metrics": ["loss", "bleu"]},
        "evaluate.metrics.1: should be 'loss', 'exact_match', 'json_valid', 'json_equal',"
        " 'number', 'pattern', 'chrf' or 'rouge_l', it is 'bleu'",
    ),
    ({"export.to": "gguf"}, "export.to: should be a list, it is 'gguf'"),
    ({"export.to": ["ggfu"]}, "export.to: there is no export 'ggfu'; did you mean 'gguf'?"),
    ({"export.gguf": []}, "export.gguf: should name at least one quantisation"),
    (
        {"evaluate.pattern": "("},
        "evaluate.pattern: is not a regular expression: missing ), unterminated subpattern at"
        " position 0",
    ),
    ({"offline": "perhaps"}, "offline: should be true or false, it is 'perhaps'"),
    ({"model": None}, "model: should be text, it is empty"),
    ({"model": 7}, "model: should be text, it is 7"),
    ({"model": " "}, "model: should be text, it is ' '"),
    ({"dataset": "rows.jsonl"}, "dataset: should be a section, it is 'rows.jsonl'"),
    ({"dataset.source": "a\0b"}, r"dataset.source: should be text, it is 'a\x00b'"),
    (
        {"dataset.source": [{"source": "a", "wieght": 2}]},
        "dataset.source.0.wieght: there is no such setting; did you mean 'weight'?",
    ),
    (
        {"dataset.source": [{"source": "a"}, {"source": "b", "weight": "two"}]},
        "dataset.source.1.weight: should be a number, it is 'two'",
    ),
    ({"dataset.source": [{"weight": 2}]}, "dataset.source.0.source: is missing"),
    ({"dataset.source": ["a"]}, "dataset.source.0: should be a section, it is 'a'"),
    (
        {"dataset.source": [{"source": "a", "format": "mesages"}]},
        "dataset.source.0.format: there is no format 'mesages'; did you mean 'messages'?",
    ),
    (
        {"dataset.source": [{"source": "a", "epochs": 2}]},
        "dataset.source.0.epochs: there is no such setting; did you mean 'train.epochs'?",
    ),
    ({"dataset.source": 3}, "dataset.source: should be text or a list, it is 3"),
    ({"train": None}, "train: should be a section, it is empty"),
    ({"method": "qlorra"}, "method: there is no method 'qlorra'; did you mean 'qlora'?"),
    (
        {"dataset.format": "mesages"},
        "dataset.format: there is no format 'mesages'; did you mean 'messages'?",
    ),
    (
        {"memory.host": "h100"},
        "memory.host: there is no host 'h100'; did you mean 'h100-80'?",
    ),
]


@pytest.mark.parametrize(("changes", "fault"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_says_what_it_is_and_what_would_be_right(
    changes: dict[str, Any], fault: str
) -> None:
    assert faults_of(changes) == [fault]


def test_a_long_value_is_cut_short() -> None:
    (fault,) = faults_of({"train.schedule": "x" * 10_000})
    assert len(fault) < 200


def test_a_setting_that_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match=r"dataset\.source: is missing"):
        check_recipe({"model": "m", "dataset": {}}, name="mine.yaml")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(
            {"method": "qlorra", "dataset": {"sorce": "x"}, "lora": {"r": 0}}, name="mine.yaml"
        )
    assert caught.value.problem == (
        "mine.yaml has 5 faults:\n"
        "  model: is missing\n"
        "  method: there is no method 'qlorra'; did you mean 'qlora'?\n"
        "  dataset.source: is missing\n"
        "  dataset.sorce: there is no such setting; did you mean 'source'?\n"
        "  lora.r: should be 1 or more, it is 0"
    )
    assert caught.value.fix == "strixft recipe --explain   shows every setting"


def test_faults_of_several_sources_are_told_at_once() -> None:
    sources = [{"source": "a", "weight": -1}, {"path": "b", "wieght": 2}]
    assert faults_of({"dataset.source": sources}) == [
        "dataset.source.0.weight: should be more than 0, it is -1",
        "dataset.source.1.source: is missing",
        "dataset.source.1.path: there is no such setting; choose one of: source, weight, split,"
        " format, columns",
        "dataset.source.1.wieght: there is no such setting; did you mean 'weight'?",
    ]


def test_one_fault_is_not_called_faults() -> None:
    with pytest.raises(RecipeError, match=r"^mine\.yaml has 1 fault:\n"):
        check_recipe({"model": "m"}, name="mine.yaml")


def test_hundreds_of_faults_are_counted_and_the_first_ones_shown() -> None:
    faults = faults_of({"lora.target_modules": list(range(500))})
    assert faults[0] == "lora.target_modules.0: should be text, it is 0"
    assert faults[20:] == ["… and 480 more"]


# Values that are right.


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_a_learning_rate_may_be_written_with_an_exponent(
    write: Callable[[str], Path], text: str
) -> None:
    recipe = load_recipe(write(f"{LEAST}train: {{learning_rate: {text}}}\n"))
    assert recipe.train.learning_rate == 1e-4


def test_a_number_with_underscores_is_read(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(write(f"{LEAST}train: {{tokens_per_update: 65_536}}\n"))
    assert recipe.train.tokens_per_update == 65536


def test_a_recipe_cannot_be_changed() -> None:
    recipe = check_recipe(yaml.safe_load(LEAST), name="mine.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "another"


def test_a_recipe_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    changes = {"model": "2024-01-01", "lora": {"target_modules": ["yes", "1e3", "é"]}}
    recipe = check_recipe(yaml.safe_load(LEAST) | changes, name="mine.yaml")
    path = tmp_path / "written.yaml"
    path.write_text(dump_recipe(recipe))
    assert check_recipe(read_settings(path), name="written.yaml") == recipe


# Files.


def test_text_that_is_not_yaml_names_the_line(write: Callable[[str], Path]) -> None:
    path = write("model: m\ndataset: {source: [\n")
    error = refusal(path)
    assert error.problem == (
        f"{path}, line 3: while parsing a flow node,"
        " expected the node content, but found '<stream end>'"
    )
    assert error.fix == f"correct {path}"


def test_a_tab_is_named_with_its_line(write: Callable[[str], Path]) -> None:
    path = write("model: m\ndataset:\n\tsource: x\n")
    assert f"{path}, line 3: " in refusal(path).problem
    assert r"found character '\t'" in refusal(path).problem


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "hello\n", "- model\n", "12\n"])
def test_a_file_without_settings_is_refused(write: Callable[[str], Path], content: str) -> None:
    path = write(content)
    error = refusal(path)
    assert error.problem == f"{path} has no settings"
    assert error.fix == "strixft recipe demo   shows a recipe"


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("model: other\n", "line 3: the key 'model' appears twice"),
        ("train:\n  seed: 1\n  seed: 1\n", "line 5: the key 'seed' appears twice"),
        ("train: {seed: 1, seed: 1}\n", "line 3: the key 'seed' appears twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(
    write: Callable[[str], Path], lines: str, fault: str
) -> None:
    path = write(LEAST + lines)
    assert refusal(path).problem == f"{path}, {fault}"


@pytest.mark.parametrize("line", ["1: 2", "null: 2", "yes: 2", "? [a, b]\n: 2", "? {a: b}\n: 2"])
def test_a_key_that_is_no_text_is_refused_with_its_line(
    write: Callable[[str], Path], line: str
) -> None:
    path = write(f"{LEAST}{line}\n")
    assert f"{path}, line 3: a key should be text" in refusal(path).problem


def test_a_merge_is_refused(write: Callable[[str], Path]) -> None:
    path = write("model: m\ndataset: &d {source: x}\ntrain: {<<: *d}\n")
    assert f"{path}, line 3: a key should be text" in refusal(path).problem


def test_a_date_is_text(write: Callable[[str], Path]) -> None:
    assert load_recipe(write("model: 2024-01-01\ndataset: {source: x}\n")).model == "2024-01-01"


def test_a_date_for_a_number_is_a_fault_like_any_other(write: Callable[[str], Path]) -> None:
    path = write(f"{LEAST}lora: {{r: 2024-13-45}}\n")
    assert "lora.r: should be a whole number, it is '2024-13-45'" in refusal(path).problem


def test_two_documents_in_one_file_are_refused(write: Callable[[str], Path]) -> None:
    path = write(f"{LEAST}---\nmodel: other\n")
    assert f"{path}, line 3: expected a single document" in refusal(path).problem


def test_a_tag_that_would_run_code_is_refused(write: Callable[[str], Path]) -> None:
    path = write("model: !!python/object/apply:os.system ['touch ran']\ndataset: {source: x}\n")
    assert f"{path}, line 1: could not determine a constructor" in refusal(path).problem
    assert not Path("ran").exists()


def test_a_file_in_another_encoding_names_the_byte(write: Callable[[bytes], Path]) -> None:
    path = write("# für\n".encode("latin-1") + LEAST.encode())
    error = refusal(path)
    assert error.problem == f"{path} is not UTF-8 text (byte 3)"
    assert error.fix == f"save {path} as UTF-8"


def test_a_byte_order_mark_does_not_matter(write: Callable[[bytes], Path]) -> None:
    assert load_recipe(write(b"\xef\xbb\xbf" + LEAST.encode())).model == "m"


def test_a_file_that_cannot_be_read_says_why() -> None:
    with pytest.raises(RecipeError, match="cannot be read: Input/output error"):
        load_recipe("/proc/self/mem")


def test_brackets_without_end_are_refused(write: Callable[[str], Path]) -> None:
    path = write(f"{LEAST}x: {'[' * 5000}{']' * 5000}\n")
    assert refusal(path).problem == f"{path} is nested too deeply"


def test_a_number_of_thousands_of_digits_is_refused(write: Callable[[str], Path]) -> None:
    path = write(f"{LEAST}train: {{seed: {'9' * 5000}}}\n")
    assert refusal(path).problem.startswith(f"{path} is not YAML: Exceeds the limit")


def test_a_file_that_unfolds_to_a_billion_values_is_refused(write: Callable[[str], Path]) -> None:
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    path = write("\n".join([*lines, "lora: {r: *j}", LEAST]))
    problem = refusal(path).problem
    assert "lora.r: should be a whole number, it is a list" in problem
    assert len(problem) < 5000


def test_a_value_that_holds_itself_is_refused(write: Callable[[str], Path]) -> None:
    path = write("model: m\ndataset: &d {source: x, more: *d}\n")
    assert f"{path}, line 2: found unconstructable recursive node" in refusal(path).problem


# Overrides.


def test_an_override_is_read_as_yaml() -> None:
    assert parse_override("lora.target_modules=[q_proj, v_proj]") == (
        "lora.target_modules",
        ["q_proj", "v_proj"],
    )


def test_the_value_of_an_override_may_hold_an_equals_sign() -> None:
    assert parse_override("model=a=b") == ("model", "a=b")


@pytest.mark.parametrize("text", ["train.seed", "=3", " =3"])
def test_an_override_without_key_or_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_override(text)
    assert caught.value.problem == f"--set {text!r} has no key or no '='"
    assert caught.value.fix == "--set train.learning_rate=2e-4"


def test_an_override_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^--set 'model=\[', line 1: ") as caught:
        parse_override("model=[")
    assert caught.value.fix == "put the value in quotes"


def test_a_key_twice_in_the_value_of_an_override_is_refused() -> None:
    with pytest.raises(RecipeError, match="the key 'r' appears twice"):
        parse_override("lora={r: 1, r: 2}")


def test_overrides_may_be_json_text() -> None:
    assert parse_overrides('{"train.learning_rate": 2e-4}') == {"train.learning_rate": 2e-4}


@pytest.mark.parametrize("empty", [None, {}, "", " ", "{}", "null"])
def test_no_overrides_change_nothing(empty: object) -> None:
    assert parse_overrides(empty) == {}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("{", "overrides are not JSON: Expecting property name"),
        ("train.seed=1", "overrides are not JSON: Expecting value"),
        ("[" * 100_000, "overrides are not JSON: "),
        ("[1]", "overrides should be a mapping of dotted keys, they are a list"),
        ([1], "overrides should be a mapping of dotted keys, they are a list"),
        (5, "overrides should be a mapping of dotted keys, they are 5"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_overrides_of_another_shape_are_refused_with_an_example(
    overrides: object, problem: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_overrides(overrides)
    assert caught.value.problem.startswith(problem)
    assert caught.value.fix == """-p overrides '{"train.learning_rate": 2e-4}'"""


def test_an_override_changes_one_setting_of_a_section(write: Callable[[str], Path]) -> None:
    path = write(f"{LEAST}train: {{epochs: 3, seed: 1}}\n")
    train = load_recipe(path, {"train.seed": 2}).train
    assert (train.epochs, train.seed) == (3, 2)


def test_an_override_may_name_a_section_that_the_file_does_not_have(
    write: Callable[[str], Path],
) -> None:
    assert load_recipe(write(LEAST), {"train.seed": 2}).train.seed == 2


def test_an_override_with_a_whole_section_keeps_what_it_does_not_name(
    write: Callable[[str], Path],
) -> None:
    path = write(f"{LEAST}train: {{epochs: 3, seed: 1}}\n")
    train = load_recipe(path, {"train": {"seed": 2}}).train
    assert (train.epochs, train.seed) == (3, 2)


@pytest.mark.parametrize("key", ["a..b", "", ".", "train.", ".seed"])
def test_an_override_with_an_empty_part_is_refused(write: Callable[[str], Path], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(LEAST), {key: 1})
    assert caught.value.problem == f"{key!r} is not a dotted key"
    assert caught.value.fix == "--set train.learning_rate=2e-4"


def test_an_override_inside_a_plain_setting_is_refused(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(LEAST), {"model.size": 1})
    assert caught.value.problem == "model.size: 'model' is not a section"
    assert caught.value.fix == "strixft recipe --explain"


def test_an_override_whose_key_is_no_text_is_refused(write: Callable[[str], Path]) -> None:
    overrides: Any = {1: 2}
    with pytest.raises(RecipeError, match="1: there is no such setting"):
        load_recipe(write(LEAST), overrides)


def test_an_override_is_checked_like_the_file(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"lora\.r: should be 1 or more, it is 0"):
        load_recipe(write(LEAST), {"lora.r": 0})


# What is made from the docstrings.


def _count(model: type[BaseModel]) -> int:
    kinds: list[Any] = [field.annotation for field in model.model_fields.values()]
    optional = [kind for kind in kinds if any(map(_is_section, get_args(kind)))]
    inside = sum(_count(part) for kind in optional for part in get_args(kind) if _is_section(part))
    return inside + sum(_count(kind) if _is_section(kind) else 1 for kind in kinds)


def _is_section(kind: Any) -> bool:
    return hasattr(kind, "model_fields")


def test_every_setting_is_explained() -> None:
    rows = list(explain())
    assert len(rows) == _count(Recipe) > 25
    for key, default, reason in rows:
        assert len(reason.split()) > 2, key
        assert default, key


def test_a_setting_without_a_default_is_said_to_be_required() -> None:
    required = [key for key, default, _ in explain() if default == "required"]
    optional = ["dataset.augment.server", "evaluate.judge.server"]  # within sections that are not
    assert required == ["model", "dataset.source", *optional]


def test_the_defaults_that_are_explained_are_those_that_are_used() -> None:
    least = yaml.safe_load(LEAST)
    recipe = flatten(check_recipe(least, name="mine.yaml").to_dict())
    least["dataset"]["augment"] = {"server": "localhost"}
    least["evaluate"] = {"judge": {"server": "localhost"}}
    recipe |= flatten(check_recipe(least, name="mine.yaml").to_dict())
    for key, default, _ in explain():
        if default != "required":
            assert yaml.safe_load(default) == recipe[key], key


def test_the_schema_describes_every_setting_of_a_section() -> None:
    described = Recipe.model_json_schema()["$defs"]["Train"]["properties"]
    explained = {key: reason for key, _, reason in explain() if key.startswith("train.")}
    assert {f"train.{key}" for key in described} == set(explained)
    for key, field in described.items():
        assert " ".join(field["description"].split()) == explained[f"train.{key}"]


def test_the_schema_refuses_unknown_settings() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


# Where recipes lie.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with recipes and notebooks of its own."""
    root = tmp_path / "project"
    (root / "recipes" / "data").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "recipes" / "mine.yaml").write_text("model: m\ndataset: {source: data/rows.jsonl}\n")
    return root


@pytest.mark.parametrize("name", ["mine", "recipes/mine.yaml"])
@pytest.mark.parametrize("folder", [".", "notebooks", "recipes/data"])
def test_a_recipe_is_found_from_every_folder_of_its_project(
    project: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    monkeypatch.chdir(project / folder)
    assert find_recipe(name) == project / "recipes" / "mine.yaml"


def test_a_path_from_where_one_stands_comes_first(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "notebooks")
    here = project / "notebooks" / "recipes"
    here.mkdir()
    (here / "mine.yaml").write_text(LEAST)
    assert find_recipe("recipes/mine.yaml") == here / "mine.yaml"


@pytest.mark.parametrize("name", ["demo", "recipes/demo.yaml"])
def test_a_recipe_that_ships_is_found_from_anywhere(name: str) -> None:
    assert find_recipe(name) == REPOSITORY / "recipes" / "demo.yaml"


def test_a_recipe_of_the_project_comes_before_one_that_ships(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    (project / "recipes" / "demo.yaml").write_text(LEAST)
    assert find_recipe("demo") == project / "recipes" / "demo.yaml"


def test_recipes_of_the_project_are_listed_with_those_that_ship(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "notebooks")
    assert {"demo", "mine"} <= set(find_recipes())


def test_the_workspace_is_where_one_stands_if_no_parent_has_recipes(tmp_path: Path) -> None:
    assert workspace() == tmp_path


def test_a_home_folder_may_be_written_with_a_tilde(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project))
    assert find_recipe("~/recipes/mine.yaml") == project / "recipes" / "mine.yaml"


def test_a_recipe_that_does_not_exist_names_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("recipes/dmeo.yaml")
    assert caught.value.problem == (
        f"there is no recipe 'recipes/dmeo.yaml' (looked from {tmp_path})"
    )
    assert caught.value.fix == "did you mean 'demo'?   strixft recipe   lists them"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "~nobody-of-this-name/x.yaml"])
def test_a_name_that_no_file_can_have_is_refused_like_any_other(name: str) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        find_recipe(name)


def test_a_folder_is_no_recipe(project: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(project / "recipes")
    assert caught.value.problem == f"{project}/recipes is a folder, not a recipe"
    assert caught.value.fix == "name a file   strixft recipe   lists them"


def test_the_data_lie_relative_to_the_recipes_file(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "notebooks")
    assert load_recipe("mine").dataset.source == str(project / "recipes" / "data" / "rows.jsonl")


def test_an_absolute_path_of_data_stays(write: Callable[[str], Path]) -> None:
    path = write("model: m\ndataset: {source: /data/rows.jsonl}\n")
    assert load_recipe(path).dataset.source == "/data/rows.jsonl"


def test_data_in_the_home_folder_may_be_written_with_a_tilde(
    write: Callable[[str], Path],
) -> None:
    path = write("model: m\ndataset: {source: ~/rows.jsonl}\n")
    assert load_recipe(path).dataset.source == os.path.expanduser("~/rows.jsonl")


def test_reasoning_cannot_be_kept_out_of_a_loss_on_all() -> None:
    data = {"model": "m", "dataset": {"source": "s", "loss_on": "all"}, "thinking": "keep"}
    with pytest.raises(RecipeError, match="should be train or drop where loss_on is all"):
        check_recipe(data, name="r")


def test_variables_of_the_template_that_a_row_sets_are_refused() -> None:
    dataset = {"source": "s", "chat_template_kwargs": {"tools": []}}
    with pytest.raises(RecipeError, match="chat_template_kwargs: 'tools' is set for each row"):
        check_recipe({"model": "m", "dataset": dataset}, name="r")
    recipe = load_recipe("demo", {"dataset.chat_template_kwargs.enable_thinking": False})
    assert recipe.dataset.chat_template_kwargs == {"enable_thinking": False}
