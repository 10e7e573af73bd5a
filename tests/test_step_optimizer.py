"""AdamW over bf16 weights learns as torch's AdamW over float32 weights does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from strixft.step.optimizer import CHUNK, BFloat16AdamW, join, split_


def gradients(count: int, size: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=draw).bfloat16() for _ in range(count)]


def drive(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        weight.grad = grad.to(weight.dtype)
        optimizer.step()


def test_halves_of_float32_are_joined_again_but_for_a_last_bit() -> None:
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, 3.0e38, 1.00390625, -1.01171875])
    draw = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    master = torch.cat([edges, draw, draw * 1e-6])
    weight, low = master.bfloat16(), torch.empty(len(master), dtype=torch.int16)
    split_(master, weight, low)
    assert torch.equal(weight, master.bfloat16())
    lost = master.view(torch.int32) - join(weight, low).view(torch.int32)
    ties = master.view(torch.int32) & 0xFFFF == 0x8000
    assert not lost[~ties].any()
    assert lost[ties].abs().max() <= 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_small_updates_move_the_weights_as_in_float32(decay: float) -> None:
    start = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, ours, plain = (nn.Parameter(start.to(t)) for t in (torch.float32, *[torch.bfloat16] * 2))
    optimizer = BFloat16AdamW([ours], 1e-5, decay)
    grads = gradients(100, 4096)
    drive(torch.optim.AdamW([exact], 1e-5, weight_decay=decay), exact, grads)
    drive(torch.optim.AdamW([plain], 1e-5, weight_decay=decay), plain, grads)
    drive(optimizer, ours, grads)
    moved = exact.detach() - start.float()
    master = join(ours.data, optimizer.state[ours]["low"])
    apart = (master - exact.detach()).norm() / moved.norm()
    lost = (plain.float().detach() - exact.detach()).norm() / moved.norm()
    assert apart < 0.05 < 0.5 < lost  # the first moment has 8 bits
    assert torch.equal(ours.data, master.bfloat16())


def test_a_weight_larger_than_a_chunk_is_updated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [nn.Parameter(torch.ones(7, 9).bfloat16()) for _ in range(2)]
    for weight, chunk in zip(weights, (CHUNK, 10), strict=True):
        monkeypatch.setattr("strixft.step.optimizer.CHUNK", chunk)
        drive(BFloat16AdamW([weight], 1e-2), weight, [g.view(7, 9) for g in gradients(3, 63)])
    assert torch.equal(*weights)


def test_it_goes_on_from_a_saved_state_bit_for_bit() -> None:
    start, grads = torch.randn(100).bfloat16(), gradients(6, 100)
    whole, first = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    undisturbed, stopped = BFloat16AdamW([whole], 1e-4), BFloat16AdamW([first], 1e-4)
    drive(undisturbed, whole, grads)
    drive(stopped, first, grads[:3])
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(first.detach().clone())
    resumed = BFloat16AdamW([again], 1e-4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    drive(resumed, again, grads[3:])
    assert torch.equal(again, whole)
    mine, theirs = (copy.copy(o.state[w]) for o, w in ((resumed, again), (undisturbed, whole)))
    assert all(torch.equal(torch.as_tensor(mine[n]), torch.as_tensor(theirs[n])) for n in theirs)
