"""`MODELS`: models whose `config.json` comes with the package; most files are reconstructed.

`configs/README.md` beside this file says which were compared with a public copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.support.tables import Table

CONFIGS = Path(__file__).parent / "configs"

_CONFIG = "https://huggingface.co/{}/blob/main/config.json"

LEFT_OUT = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
}
"""Defaults that a file leaves out, by type: transformers 5.23, `Gemma3TextConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's `config.json`."""

    name: str
    """Hub id."""
    config: Mapping[str, Any]
    source: str

    @property
    def path(self) -> Path:
        """Path to its file."""
        return CONFIGS / f"{self.name.replace('/', '--')}.json"

    @property
    def text_config(self) -> dict[str, Any]:
        """Settings of its text model, with the defaults that the file leaves out."""
        text: dict[str, Any] = {**self.config.get("text_config", self.config)}
        return LEFT_OUT.get(text["model_type"], {}) | text


def _read(path: Path) -> ModelShape:
    name = path.stem.replace("--", "/")
    config = json.loads(path.read_text(encoding="utf-8"))
    return ModelShape(name=name, config=config, source=_CONFIG.format(name))


MODELS: Table[ModelShape] = Table("model shape", *map(_read, sorted(CONFIGS.glob("*.json"))))
