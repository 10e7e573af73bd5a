"""The tensors of a checkpoint that make up each parameter.

transformers renames, stacks, splits and transposes tensors while it loads them. Its own rules are
asked here, so that a name in the files is matched to a parameter exactly as loading matches it.
Shapes: those of the files and of the model, whatever they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the files that become one or several parameters together."""

    target: str
    """The parameter; of several, the first."""
    transform: Any = None
    """transformers' `WeightConverter`; None if a tensor is the parameter as it stands."""
    names: list[str] = field(default_factory=list)
    """Names in the files, in the order in which they are loaded."""
    patterns: list[str] = field(default_factory=list)
    """Patterns of the transform, one for each name."""

    def convert(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Return the parameters that loading makes of the tensors.

        Args:
            tensors: By their names in the files, in the shapes of the files.
            model: The model they are loaded into.
        """
        if self.transform is None:
            return {self.target: tensors[self.names[0]]}
        transform = copy.deepcopy(self.transform)
        for name, pattern in zip(self.names, self.patterns, strict=True):
            transform.add_tensor(self.target, name, pattern, tensors[name])
        found = transform.convert(self.target, model=model, config=model.config)
        return {name: row[0] if isinstance(row, list) else row for name, row in found.items()}


def groups_of(model: Any, names: Iterable[str]) -> list[Group]:
    """Group the tensors that are loaded into a model by the parameters they become.

    Follows `convert_and_load_state_dict_in_model` of transformers.

    Args:
        model: On any device.
        names: Names of the tensors in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target in known:
            group = groups.setdefault(target, Group(target, by_pattern.get(pattern)))
            group.names.append(name)
            group.patterns.append(pattern or name)
    return list(groups.values())
