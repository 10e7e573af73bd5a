"""The command line: parse, call, print. Results go to standard output, the rest to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from strixft.app.options import (
    AsJson,
    Debug,
    Detach,
    RecipeArgument,
    RunArgument,
    RunDir,
    Set,
    shows_traceback,
)
from strixft.app.printing import (
    coloured,
    print_entries,
    print_json,
    print_note,
    print_table,
    print_tables,
    working,
)
from strixft.app.run_commands import RUN_COMMANDS
from strixft.support.errors import HostError, Stopped, StrixftError
from strixft.support.text import typed

if TYPE_CHECKING:
    from strixft.doctor.finding import Diagnosis
    from strixft.run.folder import Result, Run


class _Commands(TyperGroup):
    """Commands whose help is not cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.help or "") for name, one in self.commands.items()])


app = typer.Typer(
    name="strixft",
    cls=_Commands,
    help="Fine-tune language models on machines with unified memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        import strixft

        print(strixft.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fine-tune language models on machines with unified memory."""


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    from strixft.recipe.load import parse_override

    return dict(parse_override(text) for text in settings or [])


def _open(
    recipe: str, run_dir: Path | None, settings: list[str] | None, first: str | None = None
) -> Run:
    from strixft.run.open import open_run

    if run_dir is None and Path(recipe, "recipe.yaml").is_file():  # a run folder
        recipe, run_dir = str(Path(recipe, "recipe.yaml")), Path(recipe)
    folder = run_dir.absolute() if run_dir else None  # relative to the working folder
    return open_run(recipe, folder, _overrides(settings), first=first)


@contextlib.contextmanager
def _stop_printed(run: Run, as_json: bool) -> Iterator[None]:
    """Print a JSON document for a clean stop, too."""
    try:
        yield
    except Stopped as stop:
        if as_json:
            print_json({"run_dir": str(run.folder), "state": "stopped", "why": stop.problem})
        raise


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(help="Recipe: a name or a path.")] = None,
    settings: Set = None,
    explain: Annotated[bool, typer.Option("--explain", help="Explain every setting.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one with all its settings."""
    from strixft.recipe.find import HEADER, describe, find_recipes, shipped
    from strixft.recipe.load import dump_recipe, load_recipe
    from strixft.recipe.schema import Recipe
    from strixft.recipe.schema import explain as explain_settings

    if schema:
        print_json(Recipe.model_json_schema())
    elif explain:
        explained = [list(row) for row in explain_settings()]
        print_json(explained) if as_json else print_entries(explained)
    elif name is None:
        found = find_recipes()
        if as_json:
            print_json({key: str(path) for key, path in found.items()})
            return
        print_table([[name, *describe(path)] for name, path in found.items()], HEADER)
        print_note(f"\n{shipped('recipes')}\nhow much memory and time each takes: docs/recipes.md")
    else:
        loaded = load_recipe(name, _overrides(settings))
        print_json(loaded.to_dict()) if as_json else print(dump_recipe(loaded), end="")


STAGE_VERBS = {
    "prepare": "strixft.prepare.stage:prepare_recipe",
    "plan": "strixft.plan.result:plan_recipe",
    "train": "strixft.train.stage:train_recipe",
    "evaluate": "strixft.evaluate.stage:evaluate_recipe",
}
"""Stage → function that does it here, imported only when the stage runs."""


def _run_stages(
    last: str, recipe: str, run_dir: Path | None, settings: list[str] | None, as_json: bool
) -> None:
    """Run the stages up to `last` in this process and print its figures."""
    from strixft.recipe.load import flatten
    from strixft.run.folder import chosen_stages
    from strixft.support.progress import say

    run, stages = _open(recipe, run_dir, settings), chosen_stages(None, last)
    # held between two stages too: who watches would take the run for ended
    held = contextlib.nullcontext() if all(map(run.is_done, stages)) else run.driven()
    with _stop_printed(run, as_json), held:
        for stage in stages:
            result: Result = pkgutil.resolve_name(STAGE_VERBS[stage])(run)
            for note in result.figures.get("notes", ()):
                say(f"Warning: {note}")
    if as_json:
        print_json(result.to_dict())
    else:
        flat = flatten(result.figures)
        rows = [[key, str(value)] for key, value in flat.items() if not isinstance(value, list)]
        print_table(rows, [result.name, ""])


@app.command()
def prepare(
    recipe: RecipeArgument,
    augment: Annotated[
        bool, typer.Option("--augment", help="Also train on rows that a server writes.")
    ] = False,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Load, check, format and mask the data."""
    asked = ["dataset.augment.enabled=true"] if augment else []
    _run_stages("prepare", recipe, run_dir, [*(settings or []), *asked], as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    host: Annotated[str | None, typer.Option("--host", help="Plan for another machine.")] = None,
    boxes: Annotated[int, typer.Option(help="Number of such machines that share the run.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Correct the plan by small steps run on this device.")
    ] = False,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check whether the run fits before anything is loaded. Writes nothing."""
    from strixft.recipe.find import find_recipe
    from strixft.recipe.load import load_recipe
    from strixft.run.open import is_prepared_for, run_folder

    loaded = load_recipe(recipe, _overrides(settings))
    from strixft.plan.result import plan_figures, require_fit
    from strixft.plan.show import tables

    folder = run_dir.absolute() if run_dir else run_folder(find_recipe(recipe), None)
    prepared = None
    if is_prepared_for(folder, loaded):
        from strixft.prepare.stage import Prepared

        prepared = Prepared.load(folder / "prepare")
    with working("planning"):
        figures = plan_figures(loaded, host, prepared, boxes, measured=measure)
    print_json(figures) if as_json else print_tables(tables(figures))
    require_fit(figures)


@app.command()
def train(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    detach: Detach = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train by the plan; refuse a run that does not fit."""
    if detach:
        _detach("train", _open(recipe, run_dir, settings), as_json)
        return
    _run_stages("train", recipe, run_dir, settings, as_json)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the base model with the tuned one."""
    _run_stages("evaluate", recipe, run_dir, settings, as_json)


@app.command()
def export(
    recipe: RecipeArgument,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            help="merged, gguf, gguf-lora, ollama, lemonade, vllm, or one GGUF file: f16, bf16,"
            " q8_0, q6_k, q5_k_m, q4_k_m; repeatable.",
        ),
    ] = None,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make the files that servers need, and compare them with the trained model."""
    from strixft.catalog.exports import asked_exports

    asked_exports(to or ())
    run = _open(recipe, run_dir, settings)
    from strixft.export.stage import export_recipe

    with _stop_printed(run, as_json):
        exported = export_recipe(run, tuple(to or ()))
    print_json(exported.to_dict()) if as_json else print_tables(exported.tables())
    exported.require_parity()


@app.command(name="run")
def run_command(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Repeat this stage and the later ones.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stop after this stage.")] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the stages as notebooks, skip finished ones, and write the report."""
    from strixft.recipe.find import find_recipe
    from strixft.run.folder import STAGES, Result, chosen_stages

    chosen_stages(first, last)  # refuses names that are not stages
    run = _open(recipe, run_dir, settings, first)
    if detach:
        asked = {"--from": first, "--to": last}
        words = [word for name, stage in asked.items() if stage for word in (name, stage)]
        _detach("run", run, as_json, *words)
        return
    from strixft.app.watch import progress_shown
    from strixft.run.notify import told

    with told(run):
        with _stop_printed(run, as_json), progress_shown(run) as console:
            from strixft.app.notebooks import run_stages
            from strixft.app.report import write_report
            from strixft.export.result import Exported

            def notify(stage: str, done: bool) -> None:
                console.print(f"{stage}: already finished" if done else stage)

            overrides = _overrides(settings)
            run_stages(run, find_recipe(recipe), overrides, first=first, last=last, notify=notify)
            report = write_report(run)
        exported = Exported.load(run.stage_folder("export"))
        if as_json:
            results = {stage: Result.load(run.stage_folder(stage)) for stage in STAGES}
            stages = {stage: result.figures for stage, result in results.items() if result}
            print_json({"run_dir": str(run.folder), "report": str(report), "stages": stages})
        else:
            _print_metrics(run)
            print_tables(exported.tables() if exported else [])
            print(f"report: {report}")
            if run.is_done("train"):
                _print_next(run)
        if exported:
            exported.require_parity()


@app.command()
def resume(
    run: RunArgument, detach: Detach = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Continue a run where it ended: `strixft run` with its own recipe and folder."""
    from strixft.run.open import find_run

    folder = find_run(run).folder
    run_command(str(folder / "recipe.yaml"), folder, detach=detach, as_json=as_json)


def _detach(command: str, run: Run, as_json: bool, *options: str) -> None:
    """Start a command on a run in a process of its own and say how to look after it."""
    from strixft.app.detached import start_on

    start_on(run, command, *options)
    if as_json:
        print_json({"run_dir": str(run.folder), **run.status()})
        return
    name = typed(run.folder)
    print(f"{name} runs on its own\nwatch: strixft watch {name}\nstop:  strixft stop {name}")


def _print_next(run: Run) -> None:
    """Print the verdict, and what to type after a training."""
    from strixft.app.finish import next_commands, sentences

    for text in sentences(run):
        print(coloured(text, "bold"))
    first, *rest = next_commands(run)
    print("\n".join([f"next:   {first}", *(f"        {command}" for command in rest)]))


def _print_metrics(run: Run) -> None:
    from strixft.run.folder import Result
    from strixft.support.units import format_number

    evaluated = Result.load(run.stage_folder("evaluate"))
    if evaluated is not None:
        rows = [
            [name, format_number(values["base"]), format_number(values["tuned"])]
            for name, values in evaluated.figures["metrics"].items()
        ]
        print_table(rows, ["held-out rows", "base", "tuned"])


class _Benches(TyperGroup):
    """`strixft bench`: one command for each row of `BENCHES`, made on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        from strixft.bench.run import BENCHES

        return [*BENCHES, *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        from strixft.bench.run import bench_command

        return bench_command(cmd_name, _run_bench, as_json=AsJson, debug=Debug)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        from strixft.bench.run import BENCHES

        own = [(name, command.help or "") for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([(bench.name, bench.help) for bench in BENCHES.values()] + own)


bench_app = typer.Typer(
    cls=_Benches,
    help="Measure this machine or a server, or show published figures against the roofline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.add_typer(bench_app, name="bench")
for run_command_ in RUN_COMMANDS:
    app.command()(run_command_)


def _run_bench(name: str, settings: dict[str, Any], *, as_json: bool, debug: bool) -> None:
    from strixft.bench.run import run_bench
    from strixft.catalog.device_rates import hosts_file

    del debug  # its own callback has seen it
    result = run_bench(name, **settings)
    if settings.get("host_row"):
        print_note(f"rates for planning: {hosts_file()}")
    if as_json:
        print_json(result.model_dump())
        return
    print_table(*result.table())
    for text in result.details():
        print(f"\n{text}")


@bench_app.command()
def published(
    host: Annotated[str, typer.Option(help="Show this host only: strix-halo-128, …")] = "",
    model: Annotated[str, typer.Option(help="Show models whose name contains this.")] = "",
    page: Annotated[Path | None, typer.Option(help="Write everything as one HTML page.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show published figures: source, ceiling, verdict."""
    from strixft.bench.published import choose, to_json
    from strixft.support.units import format_figure

    chosen = to_json(choose(host, model))
    if page is not None:
        from strixft.bench.page import open_benchmarks

        print_note(f"page: {open_benchmarks().write(page)}")
    if as_json:
        print_json(chosen)
        return
    keys = ["model", "quantisation", "host", "tok_per_s", "ceiling_tok_per_s", "share", "verdict"]
    keys.append("mark")
    for rows in (chosen["rows"], chosen["prefill"]):
        print_tables([([[format_figure(row[key]) for key in keys] for row in rows], keys)])
    print("arithmetic and sources: --json, or --page FILE")


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Also check what this recipe needs.")] = None,
    torch: Annotated[
        bool,
        typer.Option("--torch/--no-torch", help="Try torch in a child process; takes seconds."),
    ] = True,
    script: Annotated[
        bool,
        typer.Option("--fix-script", help="Print the fixes as a shell script without running it."),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check this machine and print what to type. Changes nothing."""
    from strixft.doctor.checks import check_host, fix_script

    diagnosis = check_host(recipe, torch=torch)
    if as_json:
        print_json(diagnosis.to_dict())
    elif script:
        print(fix_script(diagnosis), end="")
    else:
        _print_findings(diagnosis)
    raise typer.Exit(diagnosis.exit_code)


STATUS_COLOURS = {"fail": "red", "warn": "yellow"}


def _print_findings(diagnosis: Diagnosis) -> None:
    for finding in diagnosis.to_fix:
        status = coloured(finding.status.upper(), STATUS_COLOURS.get(finding.status, "bold"))
        print(f"{status} {finding.check}: {finding.saw}\n  why: {finding.why}")
        if finding.fix:
            print("  fix: " + finding.fix.text.replace("\n", "\n       "))
        print(f"  source: {finding.source}\n")
    good = [[f.check, f.saw] for f in diagnosis.findings if f.status == "ok"]
    print_table(good, ["ok", ""])
    print(diagnosis.counted())


@app.command()
def mkl(as_json: AsJson = False, debug: Debug = False) -> None:
    """Build and verify the MKL preload library for Zen 5, if it matters here."""
    from strixft.doctor.mkl import check_mkl

    report = check_mkl()
    if as_json:
        print_json(report.to_dict())
        return
    print_table(report.rows(), ["", ""])
    print(f"\n{report.says}")
    if report.export:
        print(f"\n{report.export}\n\n{report.licence}")


@app.command()
def lab(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port; the next free one if it is taken.")
    ] = 8888,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    debug: Debug = False,
) -> None:
    """Open JupyterLab on 127.0.0.1 with the notebooks."""
    from strixft.app.jupyter import start_lab

    start_lab(port=port, browser=browser)


def _take_any_letters() -> None:
    """Accept all letters in names and texts, whatever the locale and the terminal support."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for kernels and children
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    os.environ.pop(
        "PYTHONIOENCODING", None
    )  # it is meant for this terminal, and children write to pipes
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line. Errors become two lines and an exit code."""
    _take_any_letters()
    try:
        app()
    except Exception as error:
        if shows_traceback():
            traceback.print_exc()
        ours = error if isinstance(error, StrixftError) else _unexpected(error)
        colour = "red" if ours.exit_code else "yellow"
        print_note(f"{coloured(ours.problem, colour, sys.stderr)}\nfix: {ours.fix}")
        raise SystemExit(ours.exit_code) from None


def _unexpected(error: Exception) -> StrixftError:
    if isinstance(error, OSError) and error.filename is not None:
        place = error.filename2 or error.filename  # a rename is reported by its target
        return HostError(
            f"{place} cannot be used: {error.strerror}",
            fix=f"ls -ld {typed(place)}   shows what is there, and whose it is;"
            " --debug shows where it failed",
        )
    return StrixftError(
        f"strixft failed: {type(error).__name__}: {error}",
        fix="run the command again with --debug, and report what it shows",
    )
