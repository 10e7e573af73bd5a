"""The structure of a model, asked of the model itself: nothing here goes by a family's name.

A configuration says little for certain: a window may be off, a list may hold for each layer, the
text model may lie inside another one. So the model is built on `meta`, without weights, and run
once; the composition of its layers and their calls of attention are recorded.

Shapes: B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from strixft.attention.backends import Heads
from strixft.attention.interface import call_ours
from strixft.attention.recorder import AttentionCall, watching
from strixft.model.config import first_lines
from strixft.model.experts import call_routed, sides_of
from strixft.model.kernels import STATES, guard_kernels, keeps_documents_apart, takes_documents
from strixft.support.errors import RecipeError
from strixft.support.private_hf import calls_attention_by_name, left_in_files
from strixft.support.private_torch import TorchDispatchMode

aten = torch.ops.aten

TOKENS = 8
"""Length of the row that a model is asked with."""


# The text part of a model


def auto_class(config: Any) -> Any:
    """Return transformers' class that builds a model for writing text.

    Wrappers of vision models that have no class for text alone (Mistral 3) are built whole.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    is_wrapper = config.model_type not in CAUSAL and not getattr(config, "auto_map", None)
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


_places: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()
"""Finding the decoder among many modules takes 10 ms, and each micro-batch asks."""


def _place_of_layers(base: Any) -> tuple[str, str]:
    """Return the path of the text decoder in a model, and the name of its list of layers.

    The decoder is the innermost module that holds the token embedding and a list of layers.
    """
    if base not in _places:
        embedding, found = base.get_input_embeddings(), None
        for path, module in base.named_modules():
            sizes = {
                name: sum(weight.numel() for weight in inner.parameters())
                for name, inner in module.named_children()
                if isinstance(inner, nn.ModuleList)
            }
            if sizes and any(inner is embedding for inner in module.modules()):
                found = path, max(sizes, key=sizes.__getitem__)
        if found is None:
            raise RecipeError(
                f"a {type(base).__name__} has no list of layers beside its token embedding",
                fix="report it with the model's name: strixft cannot follow this model's code",
            )
        _places[base] = found
    return _places[base]


def text_decoder(base: Any) -> Any:
    """Return the module that embeds tokens and runs the decoder's layers."""
    return base.get_submodule(_place_of_layers(base)[0])


def text_layers(base: Any) -> nn.ModuleList:
    """Return the decoder's layers, in order."""
    layers: nn.ModuleList = getattr(text_decoder(base), _place_of_layers(base)[1])
    return layers


def takes_positions(decoder: nn.Module) -> bool:
    """Return whether a decoder accepts the positions of tokens in their documents."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def outside_text(base: Any) -> list[str]:
    """Return the outermost modules that no text goes through, such as a vision tower."""
    decoder, head = text_decoder(base), base.get_output_embeddings()
    kept = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
    found: list[str] = []
    for name, module in base.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_inside and not any(id(m) in kept for m in module.modules()):
            found.append(name)
    return found


def tower_of(base: Any) -> list[str]:
    """Return what a wrapper of a text model has besides it."""
    is_wrapper = base.config.get_text_config() is not base.config
    return outside_text(base) if is_wrapper else []


def drop_tower(base: Any) -> None:
    """Take out of a wrapper what no text goes through: it is neither loaded nor run."""
    for name in tower_of(base):
        base.set_submodule(name, nn.Identity())


def text_only(shape: Any) -> Any:
    """Return the class of a model on `meta`, but for what `drop_tower` takes out of it."""
    whole, tower = type(shape), tower_of(shape)
    if not tower:
        return whole

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        drop_tower(self)

    own = {"__init__": init, "__module__": whole.__module__, **left_in_files(whole, tower)}
    return type(whole.__name__, (whole,), own)


def with_layers(base: Any, kept: Sequence[int]) -> Any:
    """Return a copy of a model with only some of its layers; lists of its configuration follow.

    The whole model is built first, so that no layer is built with a number that is not its own.
    `num_hidden_layers` stays: tables with a part for each layer keep their size.
    """
    decoder, layers, name = text_decoder(base), text_layers(base), _place_of_layers(base)[1]
    setattr(decoder, name, nn.ModuleList([layers[layer] for layer in kept]))
    try:
        few = copy.deepcopy(base)
    finally:
        setattr(decoder, name, layers)
    configs = (few.config.get_text_config(), text_decoder(few).config)
    for config in {id(config): config for config in configs}.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == len(layers):
                setattr(config, key, [value[layer] for layer in kept])
    return few


# The head


@dataclass(frozen=True, slots=True)
class Head:
    """A head whose logits are softcap × tanh(scale × (hidden · Wᵀ + bias) / softcap)."""

    scale: float
    softcap: float | None


_heads: weakref.WeakKeyDictionary[nn.Module, Head | None] = weakref.WeakKeyDictionary()


def linear_head(base: Any) -> Head | None:
    """Return how a model turns hidden states into logits; None if that is not linear.

    The class's own `forward` is run with a small matrix as its head and given hidden states.
    """
    if base not in _heads:
        _heads[base] = _find_head(base)
    return _heads[base]


class _Hidden:
    """Stands for a decoder's output: hidden states (B, T, C), and None by any other name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _find_head(base: Any) -> Head | None:
    whole: Any = base.get_output_embeddings()
    own = getattr(whole, "original_module", whole)  # PEFT's copy of it is trained, maybe
    if not isinstance(own, nn.Linear):
        return None
    draw = torch.Generator().manual_seed(0)
    small = nn.utils.skip_init(  # drawing its weights would move training's own generator
        nn.Linear, own.in_features, 8, own.bias is not None, device="cpu", dtype=torch.float32
    )
    for weight in small.parameters():
        weight.normal_(generator=draw)
    hidden = torch.randn(1, TOKENS, own.in_features, generator=draw) * 20 / own.in_features
    decoders = {id(m): m for m in (base.base_model, text_decoder(base)) if m is not base}
    ids, was_training = torch.zeros(1, TOKENS, dtype=torch.long), base.training
    base.set_output_embeddings(small)
    try:
        base.training = False
        for decoder in decoders.values():
            decoder.forward = lambda *_, **__: _Hidden(hidden)
        logits = base(input_ids=ids, use_cache=False).logits.float()  # (1, T, 8)
    except Exception:  # whatever a class's forward needs beyond hidden states
        return None
    finally:
        for decoder in decoders.values():
            vars(decoder).pop("forward", None)
        base.training = was_training
        base.set_output_embeddings(whole)
    plain = nn.functional.linear(hidden, small.weight, small.bias)  # (1, T, 8)
    scale = float((plain * logits).sum() / plain.square().sum())
    if torch.allclose(logits, plain * scale, rtol=1e-4, atol=1e-5):
        return Head(1.0 if abs(scale - 1) < 1e-5 else scale, None)
    settings = vars(base.config.get_text_config())
    return _capped_head(plain, logits, [v for name, v in settings.items() if "cap" in name])


def _capped_head(plain: Tensor, logits: Tensor, caps: Sequence[Any]) -> Head | None:
    """Return a head whose logits, (1, T, 8), are products that one of some values caps; or None."""
    for cap in (cap for cap in caps if isinstance(cap, int | float) and cap > logits.abs().max()):
        uncapped, well_below = cap * torch.atanh(logits / cap), logits.abs() < cap / 2
        scale = float((uncapped / plain)[well_below].median()) if well_below.any() else 1.0
        scale = 1.0 if abs(scale - 1) < 1e-4 else round(scale, 6)
        due = cap * torch.tanh(plain * scale / cap)
        if torch.allclose(logits, due, rtol=1e-4, atol=1e-5):
            return Head(scale, float(cap))
    return None


# Layers, and their calls of attention


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys and values that an attention layer caches of each token."""

    numbers: int
    window: int | None
    """Tokens that are cached; None for all."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The structure of a model."""

    heads: Heads
    windows: tuple[int, ...]
    """Tokens that layers look back, where it is not all."""
    kinds: tuple[int, ...]
    """For each layer the number of its kind: layers of one kind are built and run alike."""
    cached: tuple[Cached, ...]
    positions: int | None
    """Tokens of the longest row, if positions are looked up in a table."""
    idle: frozenset[str]
    """Last parts of the names of layers that training does not call: an adapter would not learn."""
    kernels: tuple[str, ...] = ()
    """Packages whose kernels its layers take here, for recurrence or convolution."""
    routed: tuple[tuple[int, int], ...] = ()
    """Channels in and out of experts' matrices that our grouped products multiply by."""
    recurs: bool = False
    """Some layers carry a state along the row, whether or not documents share it."""


_asked: dict[str, Architecture] = {}


def architecture_of(config: Any) -> Architecture:
    """Return the structure of the model that a configuration describes.

    Raises:
        RecipeError: The model cannot be built, or its code cannot be followed.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _asked:
        _asked[key] = _ask(config)
    return _asked[key]


def build_shape(config: Any, dtype: torch.dtype) -> Any:
    """Build the model of a configuration on torch's current default device.

    Raises:
        RecipeError: The sizes in the configuration contradict each other, or a package is missing.
    """
    own_code = type(config).__module__.startswith("transformers_modules")  # trusted: it has run
    try:
        base = auto_class(config).from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=own_code,
        )
    except ImportError as error:
        typed = re.search(r"pip install [\w.-]+", str(error))
        raise RecipeError(
            f"a {config.model_type} needs a package that is not installed: {first_lines(error)}",
            fix=typed[0] if typed else "pip install the package that is named",
        ) from error
    except Exception as error:  # whatever a model's class raises at contradicting sizes
        raise RecipeError(
            f"no {config.model_type} can be built from its config.json: {first_lines(error)}",
            fix="correct config.json, or download the model again",
        ) from error
    drop_tower(base)
    call_ours(base)
    call_routed(base)
    guard_kernels(base)
    return base


def multiplied_parameters(config: Any) -> int:
    """Return the weights that a token is multiplied with: decoder and head, no table of embeddings.

    All experts of a mixture count.
    """
    with torch.device("meta"):
        base = build_shape(config, torch.bfloat16)
    tables = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    decoder, head = text_decoder(base), base.get_output_embeddings()
    found = {id(p): p.numel() for p in decoder.parameters() if id(p) not in tables}
    if head is not None:
        found |= {id(p): p.numel() for p in head.parameters()}
    return sum(found.values())


def _ask(config: Any) -> Architecture:
    with torch.device("meta"):
        base = build_shape(config, torch.bfloat16).train()
    ran = _run(base, _decoder_or_refusal(config, base))
    _require_followed(config, base, ran.calls)
    layers = text_layers(base)
    of_layer = _by_layer(layers, ran.calls)
    kinds = _kinds(layers, of_layer)
    if not _can_be_sampled(config, kinds, of_layer):
        kinds = list(range(len(layers)))
    named = [(name.rpartition(".")[2], m) for name, m in text_decoder(base).named_modules()]
    linear = {leaf for leaf, module in named if isinstance(module, nn.Linear)}
    windows = {call.mask.window for call in ran.calls}
    return Architecture(
        heads=_heads_of(base, ran.calls),
        windows=tuple(sorted(window for window in windows if window)),
        kinds=tuple(kinds),
        cached=tuple(Cached(call.cached_numbers, call.mask.window) for call in ran.calls),
        positions=_longest_row(base),
        idle=frozenset(linear - {leaf for leaf, module in named if module in ran.modules}),
        kernels=guard_kernels(base),
        routed=sides_of(base),
        recurs=_recurs(base, ran.calls),
    )


def _decoder_or_refusal(config: Any, base: Any) -> Any:
    try:
        return text_decoder(base)
    except RecipeError:
        calls = _run(base, base).calls
        _require_followed(config, base, calls)  # an encoder, whose layers lie deeper
        raise


def _longest_row(base: Any) -> int | None:
    """Return the most tokens a row may have, if positions are looked up in a table."""
    text, decoder = base.config.get_text_config(), text_decoder(base)
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tables = [m.num_embeddings for m in decoder.modules() if isinstance(m, nn.Embedding)]
    tables += [buffer.shape[0] for buffer in decoder.buffers() if buffer.ndim == 2]
    spare = range(most, most + 8)  # OPT has two more, for padding
    return most if any(n in spare and n != text.vocab_size for n in tables) else None


class _Ran(TorchDispatchMode):
    """Records a forward pass on `meta`, where it lets numbers be asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules: set[nn.Module] = set()
        self.calls: list[AttentionCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # models only ask to leave something out
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _run(base: Any, decoder: Any) -> _Ran:
    """Run a row through the decoder of a model."""
    ids, ran = torch.zeros(1, TOKENS, dtype=torch.long, device="meta"), _Ran()  # (B, T)
    places = {"position_ids": ids} if takes_positions(decoder) else {}
    hook = register_module_forward_pre_hook(lambda module, _: ran.modules.add(module))
    try:
        with watching() as ran.calls, ran:
            decoder(input_ids=ids, use_cache=False, **places)
    except RecipeError:
        raise
    except Exception as error:  # whatever a model's code does on meta
        raise RecipeError(
            f"strixft cannot plan a {base.config.model_type}: its code fails without weights:"
            f" {first_lines(error)}",
            fix="correct config.json if its sizes contradict each other; else report it with the"
            " output of --debug",
        ) from error
    finally:
        hook.remove()
    return ran


def _require_followed(config: Any, base: Any, calls: Sequence[AttentionCall]) -> None:
    """Refuse a model that cannot be trained to continue text, or whose attention is unknown."""
    kind, masks = config.model_type, {call.mask.kind for call in calls}
    if getattr(config, "is_encoder_decoder", False):
        problem = (
            f"a {kind} is an encoder with a decoder; strixft trains models that continue one text"
        )
        fix = "a model with a decoder alone"
    elif "both ways" in masks:
        problem = (
            f"in this {kind} a token sees those that come after it: it cannot be trained to"
            " continue text"
        )
        fix = (
            "a causal language model (or is_decoder: true, use_bidirectional_attention: false in"
            " config.json, if the weights were trained so)"
        )
    elif any(name.endswith(".indexer") for name, _ in base.named_modules()):
        problem = (
            f"an indexer in each layer of a {kind} chooses which tokens are seen, which strixft"
            " cannot follow yet"
        )
        fix = "a model without one, such as those of: strixft recipe"
    elif "unknown" in masks:
        problem = f"a {kind} makes its own attention masks, which strixft cannot follow yet"
        fix = "report it with the model's name"
    else:
        return
    raise RecipeError(problem, fix=fix)


def _by_layer(layers: nn.ModuleList, calls: Sequence[AttentionCall]) -> list[list[AttentionCall]]:
    owner = {id(inner): i for i, layer in enumerate(layers) for inner in layer.modules()}
    found: list[list[AttentionCall]] = [[] for _ in layers]
    for call in calls:
        if call.module in owner:
            found[owner[call.module]].append(call)
    return found


_OWN_NUMBER = {"layer_idx", "layer_id", "layer_number", "block_idx", "training"}


def _kinds(layers: nn.ModuleList, of_layer: Sequence[Sequence[AttentionCall]]) -> list[int]:
    """Number the layers by weights, classes, settings and calls of attention."""
    numbers: dict[Any, int] = {}
    kinds = []
    for layer, calls in zip(layers, of_layer, strict=True):
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        weights = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)
        modules = tuple((n, type(m).__qualname__, _settings(m)) for n, m in layer.named_modules())
        signature = weights, modules, tuple(call.asked for call in calls)
        kinds.append(numbers.setdefault(signature, len(numbers)))
    return kinds


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    plain = (int, float, str, bool)
    items = ((n, v) for n, v in vars(module).items() if n not in _OWN_NUMBER)
    return tuple((name, value) for name, value in items if isinstance(value, plain))


def sample_layers(kinds: Sequence[Any]) -> list[int]:
    """Return layers of a deep model that stand for all: first, one of each kind between, last.

    >>> sample_layers("rrrrkkkk")
    [0, 1, 4, 7]
    """
    middle = range(1, len(kinds) - 1)
    first_of = {kinds[index]: index for index in reversed(middle)}
    return sorted({0, *first_of.values(), len(kinds) - 1})


def _can_be_sampled(
    config: Any, kinds: Sequence[int], of_layer: Sequence[Sequence[AttentionCall]]
) -> bool:
    """Return whether some of the layers, on their own, run as they do in the whole model."""
    sampled = sample_layers(kinds)
    if len(sampled) == len(kinds):
        return True
    with torch.device("meta"):
        small = build_shape(config, torch.bfloat16).train()
    small = with_layers(small, sampled)
    try:
        calls = _by_layer(text_layers(small), _run(small, text_decoder(small)).calls)
    except RecipeError:
        return False
    asked = [[call.asked for call in calls[i]] for i in range(len(sampled))]
    return asked == [[call.asked for call in of_layer[layer]] for layer in sampled]


def _recurs(base: Any, calls: Sequence[AttentionCall]) -> bool:
    """Return whether a layer takes anything from earlier tokens other than by attention."""
    if not calls or not takes_positions(text_decoder(base)):
        return True
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    named = any("attention" not in kind or "linear" in kind for kind in kinds)
    layers = text_layers(base)
    has_state = any(f".{name}".endswith(STATES) for name, _ in layers.named_parameters())
    return named or has_state or any(isinstance(m, nn.Conv1d) for m in layers.modules())


def _carries_state(base: Any, calls: Sequence[AttentionCall]) -> bool:
    """Return whether layers would carry on from one document of a row to the next."""
    layers = text_layers(base)
    is_told = takes_documents(text_decoder(base)) and keeps_documents_apart(layers)
    return _recurs(base, calls) and not (calls and is_told)


def _heads_of(base: Any, calls: Sequence[AttentionCall]) -> Heads:
    model_type, carries = base.config.get_text_config().model_type, _carries_state(base, calls)
    if not calls:
        return Heads(
            model_type=model_type, head_size=64, query_heads=1, key_heads=1,
            softcap=None, windowed=False, carries_state=True,
            own_attention=not calls_attention_by_name(base),
        )  # fmt: skip
    largest = max(calls, key=lambda call: call.head_size)
    return Heads(
        model_type=model_type,
        head_size=largest.head_size,
        query_heads=largest.query_heads,
        key_heads=largest.key_heads,
        softcap=largest.softcap,
        windowed=any(call.mask.window for call in calls),
        sinks=any(call.sinks for call in calls),
        carries_state=carries,
        value_size=None if largest.value_size == largest.head_size else largest.value_size,
        mask_alone=any(c.mask.kind == "other" or c.mask.window != c.window for c in calls),
    )
