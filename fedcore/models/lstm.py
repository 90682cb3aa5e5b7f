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
        self.lstm = Lstm(settings.embedding, settings.hidden, settings.layers)
        # Made last: the rest starts the same, whatever is read out.
        if shape.num_classes is None:
            self.head = nn.Linear(settings.hidden, shape.vocabulary)
        else:
            self.classifier = nn.Linear(settings.hidden, shape.num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.lstm(self.token(ids))
        if hasattr(self, "head"):
            logits: Tensor = self.head(states)
        else:
            logits = self.classifier(mean_of_tokens(states, ids, self.pad))
        return logits


class Lstm(nn.Module):
    """PyTorch's LSTM, with its names of parameters and its draws.

    On a CPU PyTorch's own operation is the quickest, and is not batched over clients;
    elsewhere plain operations are taken, which are. nn.LSTM itself keeps a second list
    of its weights, which follows no parameters that are put in their place.
    """

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers, self.hidden = layers, hidden
        like = nn.LSTM(inputs, hidden, layers, batch_first=True)
        for name, parameter in like.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """States of the last layer [B, L, hidden] for inputs [B, L, n]."""
        if x.device.type != "cpu":
            return self.unrolled(x)
        weights: list[Tensor] = []
        for layer in range(self.layers):
            weights += self._weights(layer)
        zeros = x.new_zeros(self.layers, len(x), self.hidden)
        outputs: Tensor = torch.lstm(
            x,
            (zeros, zeros),
            weights,
            has_biases=True,
            num_layers=self.layers,
            dropout=0.0,
            train=self.training,
            bidirectional=False,
            batch_first=True,
        )[0]
        return outputs

    def unrolled(self, x: Tensor) -> Tensor:
        """The same as `forward`, step by step in plain operations."""
        for layer in range(self.layers):
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        from_input, from_state, *biases = self._weights(layer)
        inputs = functional.linear(
            x, from_input, biases[0] + biases[1]
        )  # [B, L, 4 hidden]
        h = c = x.new_zeros(len(x), self.hidden)
        states = []
        for step in inputs.unbind(1):
            gates = step + functional.linear(h, from_state)
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, 1)

    def _weights(self, layer: int) -> list[Tensor]:
        """Of one layer: weights of inputs and of states, and their biases."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self, f"{name}_l{layer}") for name in names]
