"""A text encoder of the real ones' kind that fits a test: its folder is written by transformers."""

from pathlib import Path

import pytest
import torch

WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "fruit", "tree", "cloud", "ripe", "tall", "wide"]
WIDTH = 16


def write_tiny_encoder(path: Path, num_layers: int = 2) -> Path:
    """A BERT of few layers with a word vocabulary, whose tokenizer asks for padding to 128, as MiniLM's does."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).save_pretrained(path)
    return path
