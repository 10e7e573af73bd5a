"""Compile kernels for gfx1151 on any machine, and tell what the compiler makes of them.

    pip install triton flash-linear-attention
    python dev/target_kernels.py own            # 4-bit weights, chunked loss
    python dev/target_kernels.py layers llama-3.1-8b-lora    # a row a kernel
    python dev/target_kernels.py recipes [RECIPE …]          # a row a recipe; all if none is named
    python dev/target_kernels.py table                       # these rows, as the page has them
    python dev/target_kernels.py fla

Nothing is run: what a kernel does, and how fast, only the machine can tell. Tables are written as
Markdown, a row a kernel; `docs/target-kernels.md` holds them. Rows of recipes are written into
`strixft/catalog/target_kernels.csv`, which plan and doctor read.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx

from strixft.catalog.target_kernels import FILE, RecipeKernels, recipe_kernels
from strixft.recipe.load import load_recipe

ARCHITECTURE, WAVE = "gfx1151", 32
LDS_BYTES = 65_536
"""Most local memory of a workgroup."""

FULL_VGPRS = 96
"""Registers up to which a SIMD holds 16 waves: it has 1,536 of 32 lanes. Source: LLVM's AMDGPU.td,
`FeatureISAVersion11_5_1` with `Feature1_5xVGPRs`."""

DEVICE = SimpleNamespace(
    name=ARCHITECTURE, gcnArchName=ARCHITECTURE, major=11, minor=5, multi_processor_count=40,
    regs_per_multiprocessor=196_608, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=WAVE, shared_memory_per_block=LDS_BYTES,
    shared_memory_per_block_optin=LDS_BYTES, total_memory=2**37, L2_cache_size=2**21,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Built:
    """A kernel as the compiler made it, or why it made none."""

    name: str
    config: str
    lds_bytes: int = 0
    vgprs: int = 0
    spilled: int = 0
    """Vector and scalar registers that lie in memory instead."""
    scratch_bytes: int = 0
    wmma: int = 0
    """Instructions of the matrix unit."""
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """It compiles, fits, and keeps its values in registers."""
        return not (self.problem or self.spilled or self.scratch_bytes)


def _number(asm: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", asm)
    return int(found[1]) if found else 0


def build(name: str, config: str, source: Any, options: dict[str, Any]) -> Built:
    """Compile one kernel for the target."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        built = triton.compile(source, target=GPUTarget("hip", ARCHITECTURE, WAVE), options=options)
    except Exception as error:  # whatever a pass of the compiler raises
        return Built(name, config, problem=str(error).strip().splitlines()[0][:160])
    asm, lds = built.asm["amdgcn"], built.metadata.shared
    return Built(
        name,
        config,
        lds_bytes=lds,
        vgprs=_number(asm, "vgpr_count"),
        spilled=_number(asm, "vgpr_spill_count") + _number(asm, "sgpr_spill_count"),
        scratch_bytes=_number(asm, "private_segment_fixed_size"),
        wmma=len(re.findall(r"^\s+v_wmma", asm, re.MULTILINE)),
        problem=f"needs {lds:,} bytes of LDS" if lds > LDS_BYTES else "",
    )


# Kernels that inductor writes


@contextlib.contextmanager
def as_target() -> Iterator[None]:
    """Let inductor believe that this is the target."""
    import triton
    from torch._inductor import scheduler
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    properties = DeviceProperties(
        type="hip", index=0, multi_processor_count=DEVICE.multi_processor_count, cc=ARCHITECTURE,
        major=11, regs_per_multiprocessor=DEVICE.regs_per_multiprocessor,
        max_threads_per_multi_processor=DEVICE.max_threads_per_multi_processor,
        max_threads_per_block=DEVICE.max_threads_per_block, warp_size=WAVE,
    )  # fmt: skip
    target = GPUTarget("hip", ARCHITECTURE, WAVE)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in (
            (torch.version, "hip", "7.2"),
            (torch.cuda, "get_device_properties", lambda *_: DEVICE),
            (torch.cuda, "get_device_capability", lambda *_: (11, 5)),
            (torch.cuda, "current_device", lambda: 0),
            (DeviceProperties, "create", lambda *_: properties),
            (scheduler, "has_triton", lambda *_: True),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


class _GeneratedError(Exception):
    """The text is there; it is not run."""


def _first_cause(error: BaseException) -> BaseException:
    cause = error.__cause__ or error.__context__
    return error if cause is None else _first_cause(cause)


def triton_text(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> str:
    """Return the code that inductor writes for a graph, with the inputs' shapes, on the target.

    Args:
        graph: With decomposed operators.
        inputs: Its inputs, on `meta`.
        options: Of inductor.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    from strixft.step import lowering

    code: list[str] = []

    def generate(graph_lowering: Any) -> Any:
        code.append(str(graph_lowering.codegen()[0].value))
        raise _GeneratedError

    mode, gpu = FakeTensorMode(), torch.device("cuda", 0)
    with mode:
        fakes = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=gpu) for v in inputs
        ]
        table = torch.empty(16, device=gpu)
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs),
            lambda value: gpu if isinstance(value, torch.device) else value,
        )
        if node.op == "get_attr":
            constant = getattr(graph, node.target)
            with mode:
                setattr(graph, node.target, torch.empty_like(constant, device=gpu))
    FakeTensorProp(graph, mode).propagate(*fakes)
    passes = {"post_grad_custom_post_pass": lowering._Pass(), "reorder_for_peak_memory": False}
    with (
        mock.patch.object(GraphLowering, "compile_to_module", generate),
        # its copy asks for a device that is there
        mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda into, *_: into),
        mock.patch.object(lowering, "_on_device", return_value=table),
        torch._inductor.config.patch({**passes, "fx_graph_cache": False, **options}),
        tracing(TracingContext(mode)),
    ):
        lowering._generate_4bit()
        try:
            compile_fx_inner(graph, fakes)
        except Exception as error:  # inductor wraps ours
            if not code:
                raise RuntimeError(f"inductor wrote no code: {_first_cause(error)}") from error
    return code[0]


def kernels_in(code: str) -> dict[str, str]:
    """Return the text of each Triton kernel in inductor's code, by name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S))


def build_text(name: str, text: str, folder: Path) -> Iterator[Built]:
    """Compile a kernel that inductor wrote, in each configuration that it would try."""
    from triton.compiler import ASTSource

    path = folder / f"{name}.py"
    path.write_text(text)
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = next(value for value in vars(module).values() if hasattr(value, "configs"))
    for config in tuner.configs:
        meta = tuner._create_compile_meta(config)
        source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        shown = ", ".join(f"{key} {value}" for key, value in config.kwargs.items())
        options = tuner._create_compile_options(config, meta)
        yield build(name, f"{shown}, warps {config.num_warps}", source, options)


def build_graph(label: str, graph: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[Built]:
    """Compile every kernel of a graph."""
    options = {"split_reductions": False} if label.startswith("loss") else {}  # as the step's
    with as_target(), tempfile.TemporaryDirectory() as folder:
        for name, text in kernels_in(triton_text(graph, inputs, **options)).items():
            for built in build_text(name, text, Path(folder)):
                yield replace(built, name=f"{label} {built.name}")


# What is compiled


def graphs_of(run: Callable[[], Any]) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Return the graphs, of forward and of backward, that a function compiles on `meta`."""
    import copy

    from strixft.plan import inductor

    found, plain = [], inductor._compile

    def keep(module: fx.GraphModule, values: Any) -> Any:
        found.append((copy.deepcopy(module), list(values)))
        return plain(module, values)

    with mock.patch.object(inductor, "_backend", inductor.make_backend(keep)):
        run()
    return found


def own_graphs() -> Iterator[tuple[str, fx.GraphModule, list[Any]]]:
    """Yield our own kernels: the chunked loss, and 4-bit weights written out."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from strixft.step.compiler import select_decomp_table
    from strixft.step.loss import _in_one_pass

    for words in (32_000, 151_936, 262_144):
        logits = torch.empty(512, words, dtype=torch.bfloat16, device="meta")
        labels = torch.empty(512, dtype=torch.long, device="meta")
        for softcap in (None, 30.0):
            traced = make_fx(partial(_in_one_pass, softcap=softcap), select_decomp_table())
            graph = traced(logits, labels)
            yield f"loss of {words} words{', softcap' if softcap else ''}:", graph, [logits, labels]
    for rows, columns in ((4096, 4096), (28_672, 8192)):
        yield (f"4-bit ({rows}, {columns}):", *_unpacking(rows, columns))


def _unpacking(rows: int, columns: int) -> tuple[fx.GraphModule, list[Any]]:
    import bitsandbytes  # noqa: F401  # defines the operator

    packed = torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device="meta")
    scales = torch.empty(rows * columns // 64, dtype=torch.float32, device="meta")
    graph = fx.Graph()
    given = [graph.placeholder("packed"), graph.placeholder("scales")]
    unpack = torch.ops.bitsandbytes.dequantize_4bit.default
    arguments = (*given, 64, "nf4", [rows, columns], torch.bfloat16)
    graph.output((graph.call_function(unpack, arguments),))
    return fx.GraphModule(torch.nn.Module(), graph), [packed, scales]


def layer_graphs(recipe_name: str) -> Iterator[tuple[str, fx.GraphModule, list[Any]]]:
    """Yield the graphs of a recipe's layers, packed rows of its full length."""
    from strixft.catalog.hosts import HOSTS
    from strixft.data.batches import PackedShape, RowShape
    from strixft.model.architecture import sample_layers
    from strixft.model.source import load_config
    from strixft.plan.trace import trace_step
    from strixft.probe.job import Job

    recipe = load_recipe(recipe_name)
    job, length = Job.of(recipe, load_config(recipe), HOSTS["strix-halo-128"]), 2048
    shape = RowShape(1, length, length - 1, PackedShape(length, 8, length))
    layers = sample_layers(job.kinds)
    found = graphs_of(lambda: trace_step(job, shape, 0, 1, layers))
    for number, (graph, inputs) in enumerate(found):
        yield f"{recipe_name} {number}:", graph, inputs


# Kernels of flash-linear-attention

MOST_CONFIGS = 2
"""Configurations of a kernel of fla that are compiled: it lists up to 40."""


@contextlib.contextmanager
def compiled_instead(found: list[Built]) -> Iterator[None]:
    """Compile the kernels that are called in this block, and run none."""
    from triton.compiler import ASTSource
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    seen: set[Any] = set()

    def each(tuner: Any, *args: Any, **kwargs: Any) -> None:
        for config in tuner.configs[:MOST_CONFIGS]:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    def compile_one(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, backend, binder = kernel.create_binder()
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        shown = ", ".join(
            f"{k} {v}" for k, v in kwargs.items() if k.isupper() and isinstance(v, int)
        )
        shown += f", warps {options.num_warps}, stages {options.num_stages}"
        if (kernel.__name__, shown) not in seen:
            seen.add((kernel.__name__, shown))
            source = ASTSource(kernel, signature, constants, attributes)
            found.append(build(kernel.__name__, shown, source, dict(options.__dict__)))
            print(found[-1], file=sys.stderr, flush=True)

    with (
        mock.patch.object(Autotuner, "run", each),
        mock.patch.object(JITFunction, "run", compile_one),
    ):
        yield


def fla_kernels() -> list[Built]:
    """Compile forward and backward of the gated delta net at the size of Qwen 3.5 9B."""
    found: list[Built] = []
    with as_target():
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        tokens, heads, side = 2048, 32, 128
        query, key, value = (
            torch.zeros(1, tokens, heads, side, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        gate = torch.zeros(1, tokens, heads, requires_grad=True)
        beta = torch.zeros(1, tokens, heads, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.tensor([0, 500, 1100, tokens])
        with compiled_instead(found):
            result, _ = chunk_gated_delta_rule(
                query, key, value, gate, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=ends
            )
            result.sum().backward()
    return found


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers, default=0), max(numbers, default=0)
    return f"{most:,}" if least == most else f"{least:,}–{most:,}"


def _verdict(rows: Sequence[Built]) -> str:
    """Return what is wrong with some of a kernel's configurations, or that all is well."""
    told = []
    if bad := [row.problem for row in rows if row.problem]:
        told.append(f"{len(bad)} of {len(rows)} do not compile: {bad[0]}")
    if spills := [row for row in rows if not row.problem and not row.is_good]:
        told.append(f"{len(spills)} of {len(rows)} spill")
    if wide := [row for row in rows if row.is_good and row.vgprs > FULL_VGPRS]:
        told.append(f"{len(wide)} of {len(rows)} leave room for fewer than 16 waves a SIMD")
    return "; ".join(told) or "good"


def table(rows: Sequence[Built]) -> str:
    """Return a table in Markdown, a row a kernel; numbers are of its configurations."""
    lines = [
        "| kernel | configurations | LDS bytes | VGPRs | spilled | scratch bytes | WMMA | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_name: dict[str, list[Built]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, all_of_it in by_name.items():
        built = [row for row in all_of_it if not row.problem]
        numbers = [
            _range([getattr(row, figure) for row in built])
            for figure in ("lds_bytes", "vgprs", "spilled", "scratch_bytes", "wmma")
        ]
        cells = (f"`{name}`", str(len(all_of_it)), *numbers, _verdict(all_of_it))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


RECIPE_COLUMNS = (
    "| layers of | graphs | kernels | compiled | LDS bytes | VGPRs | spilled | scratch bytes | |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def recipe_kernels_of(name: str, seen: dict[str, list[Built]]) -> RecipeKernels | None:
    """Compile the kernels of all of a recipe's graphs, each text once.

    Args:
        name: The recipe.
        seen: Kernels by their text, of this recipe and of earlier ones.

    Returns:
        None for a recipe whose layers are not compiled.
    """
    texts: dict[str, str] = {}
    graphs = list(layer_graphs(name))
    rows: list[Built] = []
    with as_target(), tempfile.TemporaryDirectory() as folder:
        for label, graph, inputs in graphs:
            try:
                texts |= {t: n for n, t in kernels_in(triton_text(graph, inputs)).items()}
            except RuntimeError as error:
                rows.append(Built(label, "", problem=str(error)))
        for number, (text, kernel) in enumerate(texts.items()):
            plain = text.replace(kernel, "kernel")
            if plain not in seen:
                seen[plain] = list(build_text(f"k{number}", text, Path(folder)))
            rows += seen[plain]
    return _summed(name, len(graphs), len(texts), rows) if graphs else None


def _summed(name: str, graphs: int, kernels: int, rows: Sequence[Built]) -> RecipeKernels:
    figures = ("lds_bytes", "vgprs", "spilled", "scratch_bytes")
    bad = [row.problem for row in rows if row.problem]
    return RecipeKernels(
        recipe=name,
        model=load_recipe(name).model,
        graphs=graphs,
        kernels=kernels,
        configurations=len(rows),
        failing=len(bad),
        spilling=sum(not row.is_good and not row.problem for row in rows),
        crowded=sum(row.is_good and row.vgprs > FULL_VGPRS for row in rows),
        triton=version("triton"),
        torch=version("torch").partition("+")[0],
        problem=bad[0] if bad else "",
        **{figure: max((getattr(row, figure) for row in rows), default=0) for figure in figures},
    )


def _recipe_verdict(row: RecipeKernels) -> str:
    told = {
        f"do not compile: {row.problem}": row.failing,
        "spill": row.spilling,
        "leave room for fewer than 16 waves a SIMD": row.crowded,
    }
    of_all = f"of {row.configurations}"
    return "; ".join(f"{n} {of_all} {what}" for what, n in told.items() if n) or "good"


def recipe_table() -> str:
    """Return the rows that ship as a table in Markdown."""
    lines = [RECIPE_COLUMNS]
    for row in recipe_kernels().values():
        numbers = (
            row.graphs, row.kernels, row.configurations,
            row.lds_bytes, row.vgprs, row.spilled, row.scratch_bytes,
        )  # fmt: skip
        cells = (f"`{row.recipe}`", *(f"{number:,}" for number in numbers), _recipe_verdict(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compile_recipes(names: Sequence[str]) -> None:
    """Compile recipes and write their rows into the file that ships, after each."""
    rows, seen = dict(recipe_kernels()), dict[str, list[Built]]()
    for name in names or sorted(path.stem for path in Path("recipes").glob("*.yaml")):
        if (row := recipe_kernels_of(name, seen)) is not None:
            rows[name] = row
        with FILE.open("w", newline="", encoding="utf-8") as file:
            names_of_columns = [field.name for field in fields(RecipeKernels)]
            writer = csv.DictWriter(file, names_of_columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(rows[known]) for known in sorted(rows))
        print(name, row and _recipe_verdict(row), flush=True)


def main(what: str, *names: str) -> None:
    """Print the table of one group of kernels."""
    if what == "recipes":
        compile_recipes(names)
        return
    if what == "table":
        print(recipe_table())
        return
    if what == "fla":
        print(table(fla_kernels()))
        return
    graphs = own_graphs() if what == "own" else (g for n in names for g in layer_graphs(n))
    rows = []
    for label, graph, inputs in graphs:
        try:
            rows += build_graph(label, graph, inputs)
        except RuntimeError as error:
            rows.append(Built(label, "", problem=str(error)))
        print(f"{label} {len(rows)} built", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
