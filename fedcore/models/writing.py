"""Text that a model of next tokens writes, one token after another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore.data.text.tokens import Tokenizer
from fedcore.rng import rng
from fedcore.types import Params

__all__ = ["Writer"]

BROKEN = "(here the model's outputs are no numbers)"


@dataclass(frozen=True)
class Writer:
    """A function from parameters to the text that the model writes with them.

    Tokens are drawn with the probabilities of the logits over the temperature; at
    temperature 0 each is the likeliest. The model sees the last `length` tokens.
    """

    model: nn.Module
    tokenizer: Tokenizer
    length: int  # L, tokens that the model sees at most
    prompt: str = "\n"
    tokens: int = 200  # written after the prompt
    temperature: float = 0.8
    seed: int = 0

    @torch.no_grad()
    def __call__(self, params: Params) -> str:
        """The text that follows the prompt.

        Of a model that has diverged, up to where its outputs are no numbers.
        """
        ids = self.tokenizer.encode(self.prompt).tolist() or [0]
        begin = len(ids)
        draw = rng(self.seed, "writing")
        was_training = self.model.training
        self.model.eval()
        try:
            for _ in range(self.tokens):
                token = self._next(params, ids[-self.length :], draw)
                if token is None:
                    return self.tokenizer.decode(ids[begin:]) + BROKEN
                ids.append(token)
        finally:
            self.model.train(was_training)
        return self.tokenizer.decode(ids[begin:])

    def _next(
        self, params: Params, seen: list[int], draw: np.random.Generator
    ) -> int | None:
        """The token after those seen; None where the outputs are no numbers."""
        # Always of one length, as the model is recorded and tested with.
        x = torch.full((1, self.length), self.tokenizer.pad)
        x[0, : len(seen)] = torch.tensor(seen)
        device = next(iter([*params.values(), *self.model.parameters()])).device
        outputs: Tensor = functional_call(self.model, params, (x.to(device),))
        logits = outputs[0, len(seen) - 1].double().cpu()
        logits[self.tokenizer.pad] = -math.inf
        # A pretrained model may have more outputs than its tokenizer has tokens.
        logits[self.tokenizer.size :] = -math.inf
        if self.temperature == 0:
            return None if logits.isnan().any() else int(logits.argmax())
        shares = (logits / self.temperature).softmax(-1).numpy()
        if not np.isfinite(shares).all():
            return None
        return int(draw.choice(len(shares), p=shares))
