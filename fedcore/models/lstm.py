"""The recurrent model of LEAF's Shakespeare (Caldas et al., arXiv 1812.01097).

    logits = output(lstm(token[ids]))       [B, L, vocabulary]

Of classes of whole texts, the mean of the last layer's states is read out. A state
depends on the tokens before it alone, so that padding at the end changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from fedcore.models.text import TextShape, mean_of_tokens

__all__ = ["CharLstm"]


class CharLstm(BaseModel):
    """An embedding, LSTM layers and an output layer over tokens.

    >>> model = CharLstm().build_text(TextShape(65, length=80, pad=64))
    >>> sum(parameter.numel() for parameter in model.parameters())
    815945
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["char-lstm"] = "char-lstm"
    embedding: int = Field(8, ge=1, description="units of a token's vector")
    hidden: int = Field(256, ge=1, description="units of a layer")
    layers: int = Field(2, ge=1, le=1000, description="recurrent layers")

    def build_text(self, shape: TextShape) -> nn.Module:
        return Recurrent(self, shape)


class Recurrent(nn.Module):
    """Token ids [B, L] to logits."""

    def __init__(self, settings: CharLstm, shape: TextShape) -> None:
        super().__init__()
        self.pad = shape.pad
        self.token = nn.Embedding(shape.vocabulary, settings.embedding)
        self.lstm = Lstm(
            settings.embedding, settings.hidden, settings.layers, batch_first=True
        )
        # Made last: the rest starts the same, whatever is read out.
        if shape.num_classes is None:
            self.head = nn.Linear(settings.hidden, shape.vocabulary)
        else:
            self.classifier = nn.Linear(settings.hidden, shape.num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.lstm.states(self.token(ids))
        if hasattr(self, "head"):
            logits: Tensor = self.head(states)
        else:
            logits = self.classifier(mean_of_tokens(states, ids, self.pad))
        return logits


class Lstm(nn.LSTM):
    """PyTorch's LSTM on a CPU, and the same in plain operations elsewhere.

    PyTorch's own is the quickest on a CPU, and is not batched over clients; plain
    operations are.
    """

    def states(self, x: Tensor) -> Tensor:
        """States of the last layer [B, L, hidden] for inputs [B, L, n]."""
        if x.device.type == "cpu":
            outputs: Tensor = self(x)[0]
            return outputs
        return self.unrolled(x)

    def unrolled(self, x: Tensor) -> Tensor:
        """The same as `states`, step by step in plain operations."""
        for layer in range(self.num_layers):
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        weights = getattr(self, f"weight_hh_l{layer}")
        inputs = functional.linear(
            x,
            getattr(self, f"weight_ih_l{layer}"),
            getattr(self, f"bias_ih_l{layer}") + getattr(self, f"bias_hh_l{layer}"),
        )  # [B, L, 4 hidden]
        h = c = x.new_zeros(len(x), self.hidden_size)
        states = []
        for step in inputs.unbind(1):
            gates = step + functional.linear(h, weights)
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1)
