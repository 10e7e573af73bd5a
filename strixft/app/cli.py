"""The command line: parse, call, print. Results go to standard output, the rest to stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from strixft.support.errors import HostError, Stopped, StrixftError
from strixft.support.text import typed, visible

if TYPE_CHECKING:
    from strixft.doctor.finding import Diagnosis
    from strixft.run.folder import Result, Run

app = typer.Typer(
    name="strixft",
    help="Fine-tune language models on machines with unified memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _State:
    debug = False


def _set_debug(value: bool) -> None:
    _State.debug = value


RecipeArgument = Annotated[str, typer.Argument(help="Recipe: a name or a path.")]

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Run folder; runs/<recipe> if not given.")
]

Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: key=value, repeatable.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show a traceback on errors.")
]

RunArgument = Annotated[str, typer.Argument(help="Run: a name under runs/ or a folder.")]


def _print_json(data: Any) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(data, indent=2, ensure_ascii=not is_unicode))


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    from strixft.recipe.load import parse_override

    return dict(parse_override(text) for text in settings or [])


def _open(
    recipe: str, run_dir: Path | None, settings: list[str] | None, first: str | None = None
) -> Run:
    from strixft.run.open import open_run

    folder = run_dir.absolute() if run_dir else None  # --run-dir is relative to where it is typed
    return open_run(recipe, folder, _overrides(settings), first=first)


def _table(rows: list[list[str]], header: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(visible, row))
    width = None if sys.stdout.isatty() else 10_000  # lines are not folded in a pipe
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def _show_figures(result: Result) -> None:
    from strixft.recipe.load import flatten

    flat = flatten(result.figures)
    rows = [[key, str(value)] for key, value in flat.items() if not isinstance(value, list)]
    _table(rows, [result.name, ""])


@contextlib.contextmanager
def _stop_told(run: Run, as_json: bool) -> Iterator[None]:
    """A clean stop has its JSON document too."""
    try:
        yield
    except Stopped as stop:
        if as_json:
            _print_json({"run_dir": str(run.folder), "state": "stopped", "why": stop.problem})
        raise


@contextlib.contextmanager
def _followed(run: Run) -> Iterator[Any]:
    """A progress line fed by the run's status file, since stages run in other processes."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    ended = threading.Event()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("start", total=None)

        def follow() -> None:
            while not ended.wait(0.5):
                status = run.status()
                progress = status.get("progress", {})
                loss = f" loss {progress['loss']:.3f}" if "loss" in progress else ""
                rate = f" {progress['tok_per_s']} tok/s" if progress.get("tok_per_s") else ""
                bar.tasks[0].total = progress.get("total")
                stage = f"{status['stage'] or 'start'}{loss}{rate}"
                bar.update(task, description=stage, completed=progress.get("done", 0))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()


def _summary(run: Run) -> dict[str, Any]:
    from strixft.run.folder import STAGES, Result

    results = {stage: Result.load(run.stage_folder(stage)) for stage in STAGES}
    return {
        "run_dir": str(run.folder),
        "report": str(run.folder / "report.html"),
        "stages": {stage: result.figures for stage, result in results.items() if result},
    }


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(help="Recipe: a name or a path.")] = None,
    settings: Set = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every setting and why.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one complete."""
    from strixft.recipe.find import find_recipes
    from strixft.recipe.load import dump_recipe, load_recipe
    from strixft.recipe.schema import Recipe
    from strixft.recipe.schema import explain as explained

    if schema:
        _print_json(Recipe.model_json_schema())
    elif explain:
        rows = [list(row) for row in explained()]
        _print_json(rows) if as_json else _table(rows, ["setting", "default", "what it does"])
    elif name is None:
        found = {key: str(path) for key, path in find_recipes().items()}
        _print_json(found) if as_json else _table(
            [list(row) for row in found.items()], ["recipe", "file"]
        )
    else:
        loaded = load_recipe(name, _overrides(settings))
        _print_json(loaded.to_dict()) if as_json else print(dump_recipe(loaded), end="")


@app.command()
def prepare(
    recipe: RecipeArgument,
    augment: Annotated[
        bool, typer.Option("--augment", help="Train rows too that a server writes.")
    ] = False,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Load, check, format and mask the data."""
    asked = ["dataset.augment.enabled=true"] if augment else []
    _in_process(recipe, run_dir, [*(settings or []), *asked], "prepare", as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    host: Annotated[str | None, typer.Option("--host", help="Another machine's name.")] = None,
    boxes: Annotated[int, typer.Option(help="Such machines that share the run.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="Correct the plan by small steps on this device.")
    ] = False,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say whether the run fits, before anything is loaded; writes nothing."""
    from strixft.recipe.find import find_recipe
    from strixft.recipe.load import load_recipe
    from strixft.run.folder import read_recipe
    from strixft.run.open import run_folder

    loaded = load_recipe(recipe, _overrides(settings))
    from strixft.plan.result import plan_figures, require_fit
    from strixft.plan.show import tables
    from strixft.prepare.stage import Prepared

    folder = run_dir.absolute() if run_dir else run_folder(find_recipe(recipe), None)
    same = (folder / "recipe.yaml").is_file() and read_recipe(folder) == loaded
    prepared = Prepared.load(folder / "prepare") if same else None
    figures = plan_figures(loaded, host, prepared, boxes, measured=measure)
    if as_json:
        _print_json(figures)
    else:
        for rows, header in tables(figures):
            _table(rows, header)
            print()
    require_fit(figures)


@app.command()
def train(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train by the plan; refuses what does not fit."""
    _in_process(recipe, run_dir, settings, "train", as_json)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure base against tuned."""
    _in_process(recipe, run_dir, settings, "evaluate", as_json)


@app.command()
def export(
    recipe: RecipeArgument,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="merged, gguf, gguf-lora, ollama, lemonade or vllm; repeatable."),
    ] = None,
    run_dir: RunDir = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make what a server needs, and compare it with the trained model."""
    from strixft.catalog.exports import KINDS

    kinds = tuple(KINDS[kind].name for kind in to or ())
    run = _open(recipe, run_dir, settings)
    from strixft.export.stage import export_recipe

    with _stop_told(run, as_json):
        exported = export_recipe(run, kinds)
    _print_json(exported.to_dict()) if as_json else _show_export(run)
    exported.require_parity()


def _show_export(run: Run) -> None:
    from strixft.export.result import Exported

    exported = Exported.load(run.stage_folder("export"))
    for rows, header in exported.tables() if exported else []:
        _table(rows, header)
        print()


def _in_process(
    recipe: str, run_dir: Path | None, settings: list[str] | None, last: str, as_json: bool
) -> None:
    import strixft
    from strixft.run.folder import chosen_stages

    run = _open(recipe, run_dir, settings)
    with _stop_told(run, as_json):
        for stage in chosen_stages(None, last):
            result = getattr(strixft, f"{stage}_recipe")(run)
    _print_json(result.to_dict()) if as_json else _show_figures(result)


@app.command(name="run")
def run_command(
    recipe: RecipeArgument,
    run_dir: RunDir = None,
    settings: Set = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Do this stage and the later ones again.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stop after this stage.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the stages as notebooks, skip what is done, write the report."""
    from strixft.recipe.find import find_recipe
    from strixft.run.folder import chosen_stages

    chosen_stages(first, last)
    run = _open(recipe, run_dir, settings, first)
    with _stop_told(run, as_json), _followed(run) as bar:
        from strixft.app.notebooks import run_stages
        from strixft.app.report import write_report

        def notify(stage: str, done: bool) -> None:
            bar.console.print(f"{stage}: done before" if done else stage)

        overrides = _overrides(settings)
        run_stages(run, find_recipe(recipe), overrides, first=first, last=last, notify=notify)
        report = write_report(run)
    if as_json:
        _print_json(_summary(run))
        _require_parity(run)
        return
    _show_metrics(run)
    _show_export(run)
    print(f"report: {report}")
    _require_parity(run)


def _require_parity(run: Run) -> None:
    if run.is_done("export"):
        from strixft.export.result import Exported

        run.require(Exported).require_parity()


def _show_metrics(run: Run) -> None:
    from strixft.run.folder import Result
    from strixft.support.units import format_number

    evaluated = Result.load(run.stage_folder("evaluate"))
    if evaluated is not None:
        metrics = evaluated.figures["metrics"]
        rows = [
            [n, format_number(v["base"]), format_number(v["tuned"])] for n, v in metrics.items()
        ]
        _table(rows, ["held-out rows", "base", "tuned"])


@app.command()
def runs(
    names: Annotated[list[str] | None, typer.Argument(help="Two or more runs to compare.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the comparison as HTML.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs; compare those that are named."""
    from strixft.run.open import find_run, list_runs

    if names:
        _compare([find_run(name) for name in names], page, as_json)
        return

    found = list_runs()
    if as_json:
        _print_json(found)
    else:
        keys = ["run", "stage", "state", "updated"]
        _table([[str(row.get(key, "–")) for key in keys] for row in found], keys)


def _compare(found: list[Run], page: Path | None, as_json: bool) -> None:
    from strixft.app.compare import Comparison
    from strixft.support import html

    compared = Comparison(found)
    names = [run.name for run in found]
    if page is not None:
        text = html.page(" against ".join(names), "", compared._repr_html_())
        _note(f"page: {html.write_page(page, text)}")
    if as_json:
        _print_json(compared.to_dict())
        return
    for rows, header in ((compared.differences(), "setting"), (compared.results(), "figure")):
        _table(rows, [header, *names])
        print()


@app.command()
def chat(
    run: RunArgument,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model.")] = False,
    debug: Debug = False,
) -> None:
    """Talk to the trained model; end with Ctrl-D."""
    from strixft.run.open import find_run

    found = find_run(run)
    from strixft.app.chat import Chat

    talk = Chat(found, base=base)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text end no conversation
    for line in sys.stdin:
        if line.strip():
            try:
                for piece in talk.ask(line.strip()):
                    print(visible(piece), end="", flush=True)
            finally:
                print()


@app.command()
def stop(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Stop a run cleanly: its last finished update is saved, the same command goes on."""
    from strixft.run.open import find_run
    from strixft.run.stop import stop_run

    found = find_run(run)
    status = stop_run(found, lambda pid: _note(f"process {pid} ends; training after its batch"))
    if as_json:
        _print_json({"run": found.name, **status})
    else:
        print(f"{found.name}: {status['state']}")


class _Benches(TyperGroup):
    """`strixft bench`: a command per row of `BENCHES`, made when it is typed."""

    def list_commands(self, ctx: Any) -> list[str]:
        from strixft.bench.run import BENCHES

        return [*BENCHES, *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        from strixft.bench.run import bench_command

        return bench_command(cmd_name, _run_bench, debug=Debug)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        from strixft.bench.run import BENCHES

        own = [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([(bench.name, bench.help) for bench in BENCHES.values()] + own)


bench_app = typer.Typer(
    cls=_Benches,
    help="Measure this machine, or a server; show what others published, against the roofline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.add_typer(bench_app, name="bench")


def _run_bench(
    name: str, settings: dict[str, Any], *, save: bool, as_json: bool, host_row: bool = False
) -> None:
    from strixft.bench.run import run_bench

    result = run_bench(name, save=save, **settings)
    if host_row:
        from strixft.bench.run import write_host_row

        _note(f"rates for planning: {write_host_row(result)}")
    if as_json:
        _print_json(result.to_dict())
        return
    _table(*result.table())
    for text in result.details():
        print(f"\n{text}")


@bench_app.command()
def published(
    host: Annotated[str, typer.Option(help="Of this host only: strix-halo-128, …")] = "",
    model: Annotated[str, typer.Option(help="Of models with this in their name.")] = "",
    page: Annotated[Path | None, typer.Option(help="Write all as one HTML page.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Figures of others: source, mark, ceiling, verdict."""
    from strixft.bench.published import choose, to_json
    from strixft.support.units import format_figure

    chosen = to_json(choose(host, model))
    if page is not None:
        from strixft.bench.page import open_benchmarks

        _note(f"page: {open_benchmarks().write(page)}")
    if as_json:
        _print_json(chosen)
        return
    keys = ["model", "quantisation", "host", "tok_per_s", "ceiling_tok_per_s", "share", "verdict"]
    for rows in (chosen["rows"], chosen["prefill"]):
        _table(
            [[format_figure(row[key]) for key in [*keys, "mark"]] for row in rows], [*keys, "mark"]
        )
        print()
    print("arithmetic and sources: --json, or --page FILE")


@app.command()
def report(run: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Write one HTML page from a run folder."""
    from strixft.app.report import write_report
    from strixft.run.open import find_run

    path = write_report(find_run(run))
    _print_json({"report": str(path)}) if as_json else print(path)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Check also what this recipe needs.")] = None,
    torch: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Try torch in a child process: seconds.")
    ] = True,
    script: Annotated[
        bool, typer.Option("--fix-script", help="Print the fixes as a shell script; runs nothing.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is wrong with this machine, and what to type. Changes nothing."""
    from strixft.doctor.checks import check_host, fix_script

    diagnosis = check_host(recipe, torch=torch)
    if as_json:
        _print_json(diagnosis.to_dict())
    elif script:
        print(fix_script(diagnosis), end="")
    else:
        _show_findings(diagnosis)
    raise typer.Exit(diagnosis.exit_code)


def _show_findings(diagnosis: Diagnosis) -> None:
    for finding in diagnosis.to_fix:
        print(f"{finding.status.upper()} {finding.check}: {finding.saw}\n  why: {finding.why}")
        if finding.fix:
            print("  fix: " + finding.fix.text.replace("\n", "\n       "))
        print(f"  source: {finding.source}\n")
    good = [[f.check, f.saw] for f in diagnosis.findings if f.status == "ok"]
    _table(good, ["ok", ""])
    print(diagnosis.counted())


@app.command()
def mkl(as_json: AsJson = False, debug: Debug = False) -> None:
    """Zen 5 and MKL: does it matter here, build the preload library, verify it."""
    from strixft.doctor.mkl import check_mkl

    report = check_mkl()
    if as_json:
        _print_json(report.to_dict())
        return
    _table(report.rows(), ["", ""])
    print(f"\n{report.says}")
    if report.export:
        print(f"\n{report.export}\n\n{report.licence}")


@app.command()
def lab(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port; the next free one if it is taken.")
    ] = 8888,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it.")] = True,
    debug: Debug = False,
) -> None:
    """Open JupyterLab on 127.0.0.1 with the notebooks."""
    from strixft.app.lab import start_lab

    start_lab(port=port, browser=browser)


def _take_any_letters() -> None:
    """Let names and texts hold all letters, whatever the locale and the terminal know."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for kernels and children
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    os.environ.pop("PYTHONIOENCODING", None)  # it is this terminal's, and children write to pipes
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Entry point: errors become two lines and an exit code; `--debug` adds the traceback."""
    _take_any_letters()
    try:
        app()
    except Exception as error:
        if _State.debug:
            traceback.print_exc()
        ours = error if isinstance(error, StrixftError) else _unexpected(error)
        _note(f"{ours.problem}\nfix: {ours.fix}")
        raise SystemExit(ours.exit_code) from None


def _unexpected(error: Exception) -> StrixftError:
    if isinstance(error, OSError) and error.filename is not None:
        place = error.filename2 or error.filename  # a rename is told by where it leads
        return HostError(
            f"{place} cannot be used: {error.strerror}",
            fix=f"ls -ld {typed(place)}   shows what is there, and whose it is;"
            " --debug where it failed",
        )
    return StrixftError(
        f"strixft failed: {type(error).__name__}: {error}",
        fix="type it again with --debug, and report what it shows",
    )
