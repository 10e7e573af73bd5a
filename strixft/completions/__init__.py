"""Chat completions of any server that speaks the OpenAI protocol, one request at a time."""

from strixft.completions.client import Answer, Client
from strixft.completions.models import Listed, choose_name, find_model, is_local, list_models
from strixft.completions.retries import is_refusal

__all__ = [
    "Answer",
    "Client",
    "Listed",
    "choose_name",
    "find_model",
    "is_local",
    "is_refusal",
    "list_models",
]
