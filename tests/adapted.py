"""A frozen matrix with an adapter, and what the pass over products makes of a module with some."""

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor, fx, nn

from strixft.plan.inductor import make_backend
from strixft.step.matrix_products import rewrite

SIDE, RANK = 80, 4
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"
)


class Linear(nn.Module):
    """A frozen matrix with an adapter."""

    def __init__(self, width: int = SIDE, height: int = SIDE, rank: int = RANK) -> None:
        super().__init__()
        self.base = nn.Linear(width, height, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, height, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def an_input(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, tokens // 2, SIDE, dtype=dtype, requires_grad=True)


def outcome(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Result and all gradients."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    result = run(x)
    return [result, *torch.autograd.grad(result.square().sum(), [x, *weights])]


def rewriting(graphs: list[fx.Graph]) -> Any:
    """A backend that rewrites graphs, keeps them, and runs them as they are."""

    def run(module: fx.GraphModule, _: Any) -> Any:
        rewrite(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    return make_backend(run)


def calls_of(module: nn.Module, x: Tensor) -> list[Counter[str]]:
    """Compare a module with itself rewritten; what forward and backward call."""
    torch.compiler.reset()
    graphs: list[fx.Graph] = []
    compiled = torch.compile(module, backend=rewriting(graphs))
    wanted, found = outcome(module, module, x), outcome(compiled, module, x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert len(graphs) == 2
    return [Counter(str(node.target) for node in graph.nodes) for graph in graphs]
