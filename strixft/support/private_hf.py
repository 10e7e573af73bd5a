"""Private names of transformers, PEFT and datasets, each with its cause and its end.

Nothing else in strixft uses a private name of theirs (`tests/test_private_names.py`), so after an
upgrade this is the file to read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAME_OF_CONFIG = "_name_or_path"
# transformers: `PreTrainedConfig.to_dict()` has this key for the folder a configuration came from.
# End: when it is left out of the dictionary.


def compile_template(source: str) -> Any:
    """Return a chat template that can be rendered many times."""
    # transformers: `apply_chat_template` prepares each call anew, which takes several times as
    # long for the two renderings of each row.
    # End: when transformers compiles in public.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


def recompute_by(layer: Any, function: Callable[..., Any]) -> None:
    """Let a decoder layer be checkpointed by a function of its own."""
    # transformers: the public `gradient_checkpointing_enable` has one function for all layers.
    # End: when it takes one for each layer.
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = function


def calls_attention_by_name(model: Any) -> bool:
    """Return whether a model calls the attention that it is told, and computes none itself."""
    # transformers 5.23: `set_attn_implementation` warns and does nothing where Falcon, Bloom or MPT
    # have attention of their own, and `from_pretrained` takes any name for them.
    # End: when either refuses the name, or the flag is public.
    found: bool = type(model)._can_set_attn_implementation()
    return found


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Return parts of the names of weights that transformers never casts."""
    # transformers 5.23 loads the weights of a quantised checkpoint without casting any, and has no
    # public list of those that may not be cast.
    # End: when `from_pretrained(dtype=...)` casts the rest of a quantised checkpoint.
    return (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))


def left_in_files(kind: Any, modules: Sequence[str]) -> dict[str, list[str]]:
    """Return the attribute of a class of models that names weights which are not to be loaded."""
    # transformers 5.23 prints a table of all weights that a model has no place for.
    # End: when `from_pretrained` takes such names.
    known = kind._keys_to_ignore_on_load_unexpected or ()
    own = (rf"^{re.escape(name)}\." for name in modules)
    return {"_keys_to_ignore_on_load_unexpected": [*known, *own]}


def renamed_by_peft(model_type: str | None) -> Mapping[str, str]:
    """Return the names that PEFT takes for a mixture's experts or router, wherever they stand."""
    # PEFT 0.21 rewrites `target_modules` by these tables, for dense layers of that name too
    # (utils/transformers_weight_conversion.py, `_convert_peft_config_moe`).
    # End: when PEFT tells experts and layers apart, or refuses such a name.
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an earlier PEFT renames nothing
        return {}
    if conversion.get_checkpoint_conversion_mapping(model_type) is None:
        return {}
    like = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    found: Mapping[str, str] = conversion._MOE_TARGET_MODULE_MAPPING.get(like, {})
    return found


def apply_gate(experts: Any, inner: Any) -> Any:
    """Return what experts make of gate and up, (S, 2 D): (S, D)."""
    # transformers 5.23: a registered function of experts needs it, and has no public name for it.
    # End: when it has one.
    return experts._apply_gate(inner)


@dataclass(frozen=True, slots=True)
class HubFunction:
    """A function of a model that may be a package's kernel."""

    package: str
    name: str
    plain: Callable[..., Any]
    """Torch's own path."""
    is_kernel: bool
    """The package is installed, and its kernel is called."""


def hub_function(function: Any) -> HubFunction | None:
    """Return the kernel that a function of a model may stand for; None for any other function."""
    # transformers 5.17 to 5.23 chooses when a model's module is imported, and keeps the choice in a
    # closure (`integrations/hub_kernels.py`, `use_kernel_func_from_hub_with_fallback`).
    # End: when a kernel can be switched off by a public name.
    if (
        not inspect.isfunction(function)
        or "is_new_implementation" not in function.__code__.co_freevars
    ):
        return None
    kept = inspect.getclosurevars(function).nonlocals
    names = (kept["package"], kept["func_name"], kept["torch_function"])
    return HubFunction(*names, kept["is_new_implementation"])


def fingerprint_of(rows: Any) -> str:
    """Return what changes when a `datasets.Dataset` does."""
    # datasets 5: no public name.
    # End: when there is one.
    return str(rows._fingerprint)
