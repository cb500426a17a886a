"""Pretrained text encoders in torch: token ids in, unit vectors out; frozen, with adapters, or trained whole.

Deliberately does not know towers, losses or data. transformers and peft are imported here alone, when they are needed.
"""

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from towers.errors import InvalidInputError
from towers.features import RawValue
from towers.schema import PACKAGED_ENCODERS, FeatureSchema, TextFeature
from towers.text import TextTokenizer, groups_of_similar_length

TOKENIZER_FILE = "tokenizer.json"
_ENCODER_FILES = ("config.json", "model.safetensors", TOKENIZER_FILE)
_EXTRA = "pip install 'twotower[text]'"
_Module = TypeVar("_Module", bound=nn.Module)


class PretrainedText(nn.Module):
    """A transformer over tokens, the masked mean of its last hidden states, at unit length."""

    def __init__(self, encoder: nn.Module, width: int, pad_id: int) -> None:
        """Wraps an encoder.

        Args:
            encoder: Takes `input_ids` and `attention_mask`, gives `last_hidden_state` `[B, L, E]`.
            width: E
            pad_id: The encoder's own id of padding.
        """
        super().__init__()
        self.encoder: Any = encoder
        self.embedding_dim = width
        self._pad_id = pad_id
        self._is_trained = any(parameter.requires_grad for parameter in encoder.parameters())

    def train(self, mode: bool = True) -> "PretrainedText":
        """A frozen encoder drops nothing: its vectors are what they are."""
        return super().train(mode and self._is_trained)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds texts, those of similar length together, so that little of what is computed is padding.

        Args:
            ids: `[B, L]` as `towers.text.TextTokenizer` gives them, padded at the end with 0.

        Returns:
            `[B, E]` unit vectors; zeros for a text without tokens.
        """
        if torch.compiler.is_exporting():
            return self._mean(ids)
        lengths = (ids != 0).sum(dim=1)  # [B]
        groups = [torch.from_numpy(group) for group in groups_of_similar_length(lengths.numpy())]
        means = torch.cat([self._mean(ids[group, : max(1, int(lengths[group[0]]))]) for group in groups])
        return means[torch.argsort(torch.cat(groups))]  # [B, E]

    def merge_adapters(self) -> None:
        """Adds low-rank adapters to the weights that they adapt: the same function, without them."""
        if hasattr(self.encoder, "merge_and_unload"):
            self.encoder = self.encoder.merge_and_unload()

    def _mean(self, ids: Tensor) -> Tensor:
        is_token = ids != 0  # [B, L]
        # Attention over nothing is not a number: a text without tokens attends to its padding, and counts none of it.
        attended = torch.cat([torch.ones_like(is_token[:, :1]), is_token[:, 1:]], dim=1)
        tokens = torch.where(is_token, ids - 1, self._pad_id)
        # Numbers to add, since a graph of a mask of truth values looks for rows that attend to nothing in every layer.
        mask = torch.where(attended, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]  # [B, 1, 1, L]
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        sums = (hidden * is_token.unsqueeze(2)).sum(dim=1)  # [B, E]
        return functional.normalize(sums, dim=1)


def pretrained_texts(schema: FeatureSchema) -> dict[str, PretrainedText]:
    """The encoder of each feature that has one, by its name; features that share an encoder have the same object.

    Raises:
        InvalidInputError: an encoder that cannot be loaded, or settings that do not fit it; names the feature.
    """
    shared: dict[str, PretrainedText] = {}
    encoders: dict[str, PretrainedText] = {}
    for feature in schema.features:
        if not isinstance(feature, TextFeature) or feature.encoder is None:
            continue
        if feature.own_encoder:
            encoders[feature.name] = _load(feature)
            continue
        if feature.encoder not in shared:
            shared[feature.encoder] = _load(feature)
        encoders[feature.name] = shared[feature.encoder]
    return encoders


def trained_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model that are trained: its own, and those of its encoders."""
    of_encoders = {
        parameter
        for module in model.modules()
        if isinstance(module, PretrainedText)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trained if parameter not in of_encoders],
        [parameter for parameter in trained if parameter in of_encoders],
    )


def with_adapters_merged(network: _Module) -> _Module:
    """A copy of a network whose adapters are part of the weights."""
    merged = copy.deepcopy(network)
    for module in list(merged.modules()):
        if isinstance(module, PretrainedText):
            module.merge_adapters()
    return merged


def read_tokenizer(feature: TextFeature) -> str:
    """Content of the tokenizer file of a feature's encoder.

    Raises:
        InvalidInputError: there is none.
    """
    return (encoder_folder(feature) / TOKENIZER_FILE).read_text(encoding="utf-8")


def encoder_files(schema: FeatureSchema) -> dict[str, Path]:
    """The files that determine the pretrained encoders, by feature and file name.

    Raises:
        InvalidInputError: an encoder's folder or a file in it is missing.
    """
    return {
        f"{feature.name}/{file}": encoder_folder(feature) / file
        for feature in schema.features
        if isinstance(feature, TextFeature) and feature.encoder is not None
        for file in _ENCODER_FILES
    }


def encoder_folder(feature: TextFeature) -> Path:
    """Where a feature's encoder lies.

    Raises:
        InvalidInputError: the folder, its package or a file in it is missing.
    """
    assert feature.encoder is not None
    folder = Path(feature.encoder)
    if feature.encoder in PACKAGED_ENCODERS:
        package = importlib.util.find_spec(PACKAGED_ENCODERS[feature.encoder])
        if package is None or package.origin is None:
            raise InvalidInputError(f"{_place(feature)}: its package is not installed; {_EXTRA}")
        folder = Path(package.origin).parent / "model"
    missing = [file for file in _ENCODER_FILES if not (folder / file).is_file()]
    if missing:
        raise InvalidInputError(
            f"{_place(feature)}: {folder} has no {' and no '.join(missing)}; give the folder of a Hugging Face "
            f"encoder, or one of {list(PACKAGED_ENCODERS)}"
        )
    return folder


def truncation_note(feature: TextFeature, tokenizer: str, values: Sequence[RawValue], of: str) -> str | None:
    """Says how many texts lose their end; None where none does.

    Args:
        feature: Says how many tokens are kept.
        tokenizer: Content of its tokenizer file.
        values: Texts, None where missing.
        of: What they belong to, for the message.
    """
    cutter = TextTokenizer(tokenizer, feature.max_length)
    num_truncated = sum(isinstance(value, str) and cutter.is_truncated(value) for value in values)
    if not num_truncated:
        return None
    return (
        f"feature {feature.name!r}: {num_truncated:,} of {len(values):,} {of} have a text of more than "
        f"{feature.max_length} tokens, of which the first {feature.max_length} are read"
    )


def _load(feature: TextFeature) -> PretrainedText:
    transformers, peft = _libraries(feature)
    folder = encoder_folder(feature)
    transformers.utils.logging.disable_progress_bar()
    try:
        encoder = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{_place(feature)}: {folder} cannot be loaded: {error}") from error
    settings = encoder.config
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and feature.max_length > positions:
        raise InvalidInputError(
            f"feature {feature.name!r}, max_length: {feature.encoder!r} reads at most {positions} tokens"
        )
    encoder.pooler = None  # The mean is taken of the hidden states that it would read.
    if feature.tuning == "lora":
        encoder = _with_adapters(encoder, feature, peft)
    elif feature.tuning == "projection":
        encoder.requires_grad_(False)
    return PretrainedText(encoder, settings.hidden_size, settings.pad_token_id or 0)


def _with_adapters(encoder: Any, feature: TextFeature, peft: Any) -> Any:
    """Low-rank adapters on linear layers, all else frozen (Hu et al. 2021, "LoRA")."""
    linear = {name.rpartition(".")[2] for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    unknown = sorted(set(feature.lora_targets) - linear)
    if unknown:
        raise InvalidInputError(
            f"feature {feature.name!r}, lora_targets: the encoder has no linear layer {', '.join(unknown)}; "
            f"use some of {sorted(linear)}"
        )
    options = peft.LoraConfig(
        r=feature.lora_rank,
        lora_alpha=feature.lora_alpha,
        lora_dropout=feature.lora_dropout,
        target_modules=list(feature.lora_targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it gives up.
        return peft.get_peft_model(encoder, options)


def _libraries(feature: TextFeature) -> tuple[Any, Any]:
    try:
        # Here, because they take seconds to import and most towers have no encoder.
        import peft
        import transformers
    except ImportError as error:
        raise InvalidInputError(f"{_place(feature)}: it needs transformers and peft; {_EXTRA}") from error
    return transformers, peft


def _place(feature: TextFeature) -> str:
    return f"feature {feature.name!r}, encoder = {feature.encoder!r}"
