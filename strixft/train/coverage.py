"""Modules and tensors that a run trains, told and proven in its first two updates.

An adapter may sit on less than its user believes, learn nothing where a kernel reads the weights
past it, or never be added to the result. So modules are counted by kind and layer after loading;
two updates are watched, tensor by tensor; and hidden states with and without the adapter compared.

Shapes: N trained tensors, T tokens, C hidden sizes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strixft.data.batches import Batch
from strixft.model.adapter import ADAPTER_NAME, base_of, decoder_layers
from strixft.model.architecture import outside_text, text_decoder
from strixft.model.targets import is_linear, is_named
from strixft.step.update import TrainingStep
from strixft.support.errors import StageError
from strixft.support.files import write_json

UPDATES = 2
"""Updates that are watched: B = 0 leaves A without a gradient in the first."""

SAMPLED = 64
"""Values of a tensor that are compared before and after an update, besides the two whose gradients
are largest and smallest."""

TOKENS = 64
"""Tokens whose hidden states are compared with the adapter on and off."""

NAMED = 6
"""Most tensors or layers that an error names."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """Modules of one name, over the layers."""

    name: str
    """Path in a layer; a number, such as an expert's, is `*`."""
    layers: int
    """Layers that have it; 0 for a module outside the layers."""
    trained: int
    """Layers in which it is trained."""


def _places(model: nn.Module) -> Iterator[tuple[int | None, str, nn.Module]]:
    """Yield the text decoder's modules: layer, path in it, module; outside the layers None."""
    inside: set[int] = set()
    for number, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            inside.add(id(module))
            yield number, path, module
    for path, module in text_decoder(base_of(model)).named_modules():
        if id(module) not in inside:
            yield None, path, module


def _kind(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path.replace(".base_layer", ""))


def _adapted(model: nn.Module) -> Iterator[tuple[int | None, str, bool]]:
    """Yield layer and path of each linear module, and whether it has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    within: tuple[int | None, str] | None = None
    for number, path, module in _places(model):
        if within and number == within[0] and path.startswith(f"{within[1]}."):
            continue
        within = (number, path) if isinstance(module, BaseTunerLayer) else None
        if within or is_linear(module):
            yield number, path, within is not None


def _trained(model: nn.Module) -> Iterator[tuple[int | None, str, bool]]:
    """Yield layer and path of each weight, and whether it is trained."""
    for number, path, module in _places(model):
        for name, weight in module.named_parameters(recurse=False):
            yield number, f"{path}.{name}".lstrip("."), weight.requires_grad


def _kinds(found: Sequence[tuple[int | None, str, bool]]) -> list[Kind]:
    there, trained = defaultdict[str, set[Any]](set), defaultdict[str, set[Any]](set)
    for number, path, is_trained in found:
        there[_kind(path)].add(number)
        if is_trained:
            trained[_kind(path)].add(number)
    return [
        Kind(name, len(numbers - {None}), len(trained[name] - {None}))
        for name, numbers in there.items()
    ]


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def _require_adapted(model: Any, found: Sequence[tuple[int | None, str, bool]]) -> None:
    """Require an adapter on each module that the adapter's configuration names."""
    config = model.peft_config[ADAPTER_NAME]
    if isinstance(config.target_modules, str):
        return
    layers = config.layers_to_transform
    chosen = {layers} if isinstance(layers, int) else set(layers or ())
    prefix = next(n for n, m in model.named_modules() if m is decoder_layers(model))
    prefix = prefix.removeprefix("base_model.model.")
    missed = []
    for number, path, is_adapted in found:
        whole = path if number is None else f"{prefix}.{number}.{path}"
        is_left_out = config.exclude_modules and re.fullmatch(config.exclude_modules, whole)
        is_chosen = not chosen or number in chosen
        if is_chosen and not is_adapted and not is_left_out:
            missed += [whole] if is_named(whole, config.target_modules) else []
    if missed:
        raise StageError(
            f"{len(missed)} layers that lora.target_modules names have no adapter:"
            f" {_listed(missed)}; nothing was trained",
            fix="--set lora.target_modules=all-linear   and --from plan",
            settings={"lora.target_modules": "all-linear"},
        )


def describe(model: nn.Module) -> Json:
    """Return which modules are trained, by kind.

    Returns:
        `kinds`; `layers`; `layers_without`: numbers of layers in which nothing is trained;
        `frozen`: modules outside the text decoder that nothing trains; `tensors`; `parameters`.

    Raises:
        StageError: A layer that the recipe's targets name has no adapter.
    """
    is_adapter = hasattr(model, "peft_config")
    found = list(_adapted(model) if is_adapter else _trained(model))
    if is_adapter:
        _require_adapted(model, found)
    layers = len(decoder_layers(model))
    with_any = {number for number, _, is_trained in found if is_trained}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return {
        "kinds": [asdict(kind) for kind in _kinds(found)],
        "layers": layers,
        "layers_without": [n for n in range(layers) if n not in with_any],
        "frozen": outside_text(base_of(model)),
        "tensors": len(weights),
        "parameters": sum(weight.numel() for weight in weights),
    }


def warnings_of(told: Json) -> list[str]:
    """Return what a user should know of `describe`."""
    without, layers = told["layers_without"], told["layers"]
    if not without:
        return []
    rest = [k["name"] for k in told["kinds"] if not k["trained"] and k["layers"]]
    return [
        f"{layers - len(without)} of {layers} layers are trained: nothing is in"
        f" {_listed(without)}, which have {_listed(rest)}"
    ]


def _is_expert(name: str) -> bool:
    return re.search(r"\.experts\.\d+\.", name) is not None


class FirstUpdates:
    """Watches the first updates of a process; waits for the device once, after the last of them.

    Args:
        step: The training step.
        batch: Its tokens are used to compare the adapter on and off.
        proven: Called with the figures, once all is well.
    """

    def __init__(self, step: TrainingStep, batch: Batch, proven: Callable[[Json], None]) -> None:
        self._step, self._proven, self._seen = step, proven, 0
        self._ids: Tensor = batch["input_ids"][:1, :TOKENS].clone()  # (1, T)
        self._largest: list[Tensor] = []  # of each update, (N,): -1 where there is no gradient
        self._moved: list[Tensor] = []  # of each update, (N,)
        self._before: list[tuple[Tensor, Tensor]] = []  # places and values of each tensor

    @torch.no_grad()
    def before_step(self) -> None:
        """Note gradients, and some values of each tensor."""
        if self._seen == UPDATES:
            return
        weights, device = self._step.trainable(), self._ids.device
        none = torch.tensor(-1.0, device=device)
        self._gradients = torch.stack(
            [none if w.grad is None else _largest(w.grad) for w in weights]
        )
        places = [_sampled(weight) for weight in weights]
        self._before = [
            (where, self._values(weight, where))
            for weight, where in zip(weights, places, strict=True)
        ]

    def _values(self, weight: nn.Parameter, where: Tensor) -> Tensor:
        """Return values of a weight, with the bits that an optimizer keeps beside it."""
        found = weight.detach().flatten()[where].float()
        low = self._step.optimizer.state.get(weight, {}).get("low")
        rest = torch.zeros_like(found) if low is None else low.flatten()[where].float()
        return torch.stack([found, rest])

    @torch.no_grad()
    def after_step(self) -> None:
        """Note what moved; judge after the last update that is watched.

        Raises:
            StageError: A tensor has no gradient or did not move, or the adapter changes nothing.
        """
        if self._seen == UPDATES or self._step.skipped:
            return
        moved = [
            (self._values(weight, where) != values).any()
            for weight, (where, values) in zip(self._step.trainable(), self._before, strict=True)
        ]
        self._largest.append(self._gradients)
        self._moved.append(torch.stack(moved))
        self._seen, self._before = self._seen + 1, []
        if self._seen == UPDATES:
            self._proven(self._judge())

    def _judge(self) -> Json:
        names = [name for name, _ in self._step.named_trainable()]
        largest = torch.stack(self._largest).amax(0).tolist()
        moved = torch.stack(self._moved).any(0).tolist()
        rows = list(zip(names, largest, moved, strict=True))
        unreached = [name for name, most, _ in rows if most <= 0 and _is_expert(name)]
        is_adapter = hasattr(self._step.model, "peft_config")
        unused = [n for n, most, _ in rows if most < 0 and n not in unreached and not is_adapter]
        # tiny gradients of A move it by less than a rounding: its B tells that the pair learns
        learning = {_pair(name) for name, most, _ in rows if most > 0}
        going = {_pair(name) for name, _, is_moved in rows if is_moved}
        still = [name for name, most, _ in rows if most > 0 and _pair(name) not in going]
        self._refuse(still, "did not move", "--set train.learning_rate=…   larger", {})
        left = {*unreached, *unused}
        silent = [
            name
            for name, most, _ in rows
            if most <= 0 and name not in left and _pair(name) not in learning
        ]
        self._refuse(silent, "got no gradient", *_without(self._step, silent))
        figures: Json = {
            "updates": UPDATES,
            "moved": sum(moved),
            "unreached_experts": len(unreached),
            "unused": unused,
        }
        return figures | (self._on_and_off() if is_adapter else {})

    def _refuse(self, names: Sequence[str], what: str, fix: str, settings: Json) -> None:
        if names:
            raise StageError(
                f"{len(names)} of {len(self._step.trainable())} trained tensors {what} in"
                f" {UPDATES} updates: {_listed(names)}; training stopped, nothing was saved",
                fix=f"{fix}   and --from plan",
                settings=settings,
            )

    @torch.no_grad()
    def _on_and_off(self) -> Json:
        """Compare hidden states with the adapter and without it, in float32."""
        model: Any = self._step.model
        decoder = text_decoder(base_of(model))

        def hidden() -> Tensor:  # (1, T, C)
            found: Tensor = decoder(input_ids=self._ids, use_cache=False)[0]
            return found.float()

        model.eval()  # a mask of dropout would be drawn, and a resumed run draws at other updates
        with torch.compiler.set_stance("force_eager"):  # another length would compile anew
            with_adapter = hidden()
            with model.disable_adapter():
                without = hidden()
        model.train()
        apart = float((with_adapter - without).norm() / without.norm())
        if not apart > 0:  # NaN is not more
            raise StageError(
                f"the model answers alike with its adapter and without it after {UPDATES} updates,"
                " so nothing would be learned; training stopped, nothing was saved",
                fix="--set train.compile=none, or another lora.target_modules   and --from plan",
                settings={"train.compile": "none"} if self._step.options.compiled else {},
            )
        return {"adapter_changes": apart, "tokens": self._ids.shape[1]}


def not_finite(step: TrainingStep) -> str:
    """Return the tensors whose gradients are not finite, to end a sentence with."""
    bad = [
        n for n, w in step.named_trainable() if w.grad is not None and not w.grad.isfinite().all()
    ]
    return f" in {len(bad)} of {len(step.trainable())} tensors: {_listed(bad)}" if bad else ""


def _pair(name: str) -> str:
    """Return what the tensors of one adapted module have in common in their names."""
    return re.sub(r"lora_[A-Za-z_]+", "lora", name)


def _largest(gradient: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(gradient, float("inf"))
    return largest.float()


def _sampled(weight: nn.Parameter) -> Tensor:
    """Return places in a flat weight: evenly apart, and those of the extreme gradients."""
    count, device = weight.numel(), weight.device
    even = torch.arange(0, count, max(1, count // SAMPLED), device=device)
    if weight.grad is None:
        return even
    flat = weight.grad.flatten()
    return torch.cat([even, torch.stack([flat.argmax(), flat.argmin()])])


def _without(step: TrainingStep, names: Sequence[str]) -> tuple[str, Json]:
    """Return a fix, and its settings: the targets that learn."""
    config = getattr(step.model, "peft_config", {}).get(ADAPTER_NAME)
    if config is None or isinstance(config.target_modules, str):
        return "--set method=lora", {"method": "lora"}
    kept = sorted(
        target
        for target in config.target_modules
        if not any(f".{target}.lora" in name for name in names)
    )
    if not kept:
        return "--set method=full", {"method": "full"}
    listed = ",".join(kept)
    return f"--set 'lora.target_modules=[{listed}]'", {"lora.target_modules": kept}


def cover(step: TrainingStep, batch: Batch, path: Path) -> tuple[Json, FirstUpdates | None]:
    """Tell what is trained, and watch the first updates unless an earlier process has.

    Args:
        step: The training step.
        batch: Any of the run's.
        path: File with what is trained, once it is proven.

    Raises:
        StageError: A layer that the recipe names has no adapter.
    """
    told = describe(step.model)
    if path.is_file():
        return told, None
    return told, FirstUpdates(step, batch, lambda seen: write_json(path, told | seen))
