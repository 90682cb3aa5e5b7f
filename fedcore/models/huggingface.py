"""Models of Hugging Face's transformers, where the extra `hf` is installed.

They compute in float32, with attention as it is written ("eager"), without dropout: a
step is then a function of its arguments, which batches over clients and records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from fedcore.errors import SettingsError
from fedcore.models.text import TextShape

__all__ = ["HuggingFace", "installed"]

REASON = 300  # characters at most of what transformers says, which may be many lines
SOURCE = 'model.name = "hf"'


class HuggingFace(BaseModel):
    """A transformer from a local folder, or made from a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["hf"] = "hf"
    path: Path | None = Field(
        None, description="folder of a pretrained model: config.json, model.safetensors"
    )
    config: dict[str, Any] = Field(
        {},
        description='or a configuration to make one from: {model_type = "llama", ...}; '
        "sizes of the vocabulary and of the context are those of the text, by default",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> HuggingFace:
        if (self.path is None) == (not self.config):
            raise ValueError(
                "give path (a folder) or config (such as "
                '{model_type = "llama", hidden_size = 64}), and not both'
            )
        if self.config and not isinstance(self.config.get("model_type"), str):
            raise ValueError(
                'config has no model_type, a name of transformers such as "llama", '
                '"gpt2", "bert"'
            )
        return self

    def build_text(self, shape: TextShape) -> nn.Module:
        """The model, from the folder or with weights drawn from PyTorch's generator.

        It maps ids [B, L] to logits. Raises SettingsError for one that is no decoder
        (next tokens) or no classifier (classes), or too small for the text.
        """
        from fedcore.models.transformer import PretrainedText

        transformers = installed("transformers", SOURCE)
        with self._told(), _quiet():
            config = self._configuration(transformers, shape)
            inner = self._made(transformers, config, shape)
        inner = inner.float()
        if self.path is not None:
            self._fit_vocabulary(inner, shape)
        is_causal = shape.num_classes is None or _is_decoder(transformers, config)
        return PretrainedText(inner, shape, is_causal=is_causal)

    @property
    def source(self) -> str:
        """The setting that names the model, for messages."""
        if self.path is not None:
            return f"model.path = {self.path}"
        return f'model.config, model_type = "{self.config["model_type"]}"'

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Inside, an error of transformers is told in one line as a SettingsError."""
        try:
            yield
        except SettingsError:
            raise
        except Exception as error:  # it may raise anything
            reason = shorten(str(error), REASON) or type(error).__name__
            raise SettingsError(
                f"{self.source}: transformers cannot make it: {reason}"
            ) from error

    def _configuration(self, transformers: ModuleType, shape: TextShape) -> Any:
        """Its configuration: without dropout, in the sizes of the text."""
        if self.path is not None:
            if not (self.path / "config.json").is_file():
                raise SettingsError(
                    f"{self.source}: there is no config.json; expected the folder of "
                    "a model that transformers saved (save_pretrained)"
                )
            config = transformers.AutoConfig.from_pretrained(
                self.path, local_files_only=True
            )
        else:
            given = dict(self.config)
            kind = given.pop("model_type")
            config = transformers.AutoConfig.for_model(kind, **given)
            self._refuse_unknown(config)
            if "vocab_size" not in given:
                config.vocab_size = shape.vocabulary
            self._give_context(config, shape)
            config.pad_token_id = shape.pad
        self._refuse_sizes(config, shape)
        if getattr(config, "is_encoder_decoder", False):
            raise SettingsError(
                f"{self.source}: an encoder with a decoder has two inputs; use a "
                'decoder ("llama", "gpt2") or an encoder ("bert")'
            )
        _still(config)
        config.use_cache = False  # of keys and values, which nothing here asks for
        return config

    def _refuse_unknown(self, config: Any) -> None:
        """Raise SettingsError for a key that the kind of model does not have."""
        usual = type(config)()
        for key in self.config:
            if key != "model_type" and not hasattr(usual, key):
                raise SettingsError(
                    f'{self.source}: it has no setting "{key}"; expected those of '
                    f"transformers.{type(config).__name__}"
                )

    def _give_context(self, config: Any, shape: TextShape) -> None:
        """Raise the number of positions to those of the text, where none is given."""
        for key in ("max_position_embeddings", "n_positions"):
            if not hasattr(config, key) or key in self.config:
                continue
            if isinstance(getattr(config, key), int):
                # RoBERTa counts positions from behind the id of padding.
                setattr(config, key, shape.length + shape.pad + 2)

    def _refuse_sizes(self, config: Any, shape: TextShape) -> None:
        """Raise SettingsError for a vocabulary or a context that is too small."""
        missing = shape.vocabulary - config.vocab_size
        # A tokenizer without padding has got an id for it, behind all others.
        is_padding = missing == 1 and shape.pad == shape.vocabulary - 1
        if missing > 0 and not (is_padding and self.path is not None):
            raise SettingsError(
                f"{self.source}: it has {config.vocab_size} tokens and the text has "
                f"ids up to {shape.vocabulary - 1}; set text.tokens to its own "
                "tokenizer's folder, or another vocab_size"
            )
        context = getattr(config, "max_position_embeddings", None)
        if isinstance(context, int) and context < shape.length:
            raise SettingsError(
                f"text.length = {shape.length}: {self.source} reads {context} tokens "
                "at most"
            )
        window = getattr(config, "sliding_window", None)
        if isinstance(window, int) and window < shape.length:
            raise SettingsError(
                f"text.length = {shape.length}: {self.source} looks back {window} "
                "tokens (sliding_window), and a mask of all is made here; set "
                f"text.length to {window} at most"
            )

    def _made(self, transformers: ModuleType, config: Any, shape: TextShape) -> Any:
        """The model; the layer that reads out classes is drawn."""
        kind: Any = transformers.AutoModelForCausalLM
        if shape.num_classes is not None:
            kind = transformers.AutoModelForSequenceClassification
            config.num_labels = shape.num_classes
            config.pad_token_id = shape.pad
        if self.path is None:
            return kind.from_config(config, attn_implementation="eager")
        return kind.from_pretrained(
            self.path,
            config=config,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,  # a pickle may run code
        )

    def _fit_vocabulary(self, inner: Any, shape: TextShape) -> None:
        """Give the model a token for padding, where its tokenizer has none."""
        if inner.config.vocab_size < shape.vocabulary:
            inner.resize_token_embeddings(shape.vocabulary, mean_resizing=False)


def installed(name: str, setting: str) -> ModuleType:
    """The module. Raises SettingsError, for the setting that needs it, without it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(
            f"{setting}: {name} is not installed ({error}); pip install 'fedcore[hf]'"
        ) from error


def _is_decoder(transformers: ModuleType, config: Any) -> bool:
    """Whether a model of this kind sees what came before, and no more."""
    writes = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    fills_in = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return writes and not fills_in


def _still(config: Any) -> None:
    """Set every share that is dropped to 0, in the configurations inside as well."""
    for key, value in vars(config).items():
        if isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)
        elif hasattr(value, "model_type") and value is not config:
            _still(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers tells nothing but errors, and shows no bars."""
    messages: Any = installed("transformers", SOURCE).utils.logging

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.ERROR)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
