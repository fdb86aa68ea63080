"""A small GPT in fp64, with the options of its architecture."""

from typing import Any

import torch
from torch import nn

from dlopt.models.gpt import GPT

VOCABULARY, CONTEXT = 13, 7


OPTIONS = [
    {},
    {"norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": True, "tied_embeddings": False},
    {"positions": "rotary", "bias": False, "attention_scale": "linear", "expansion": 2.5, "activation": "relu2"},
]


def gpt(**changed: Any) -> GPT:
    keys: dict[str, Any] = {
        "width": 12, "depth": 2, "heads": 3, "expansion": 4.0, "norm": "layer", "positions": "learned",
        "activation": "gelu", "qk_norm": False, "attention_scale": "sqrt", "tied_embeddings": True, "bias": True,
        "dropout": 0.0, "input_shape": (CONTEXT,), "vocabulary": VOCABULARY,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT(**{**keys, **changed}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model
