"""The same adapters by sentence-transformers and peft, run by a Python that has them; takes the steps it is asked for.

Deliberately imports nothing of this project. Its argument is a file that says what is trained, as JSON; each line on
the standard input begins a training, asks for a step or saves the encoder.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import sentence_transformers
import torch
import transformers
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss


class Training:
    """Adapters on an encoder, by the cached loss over the other abstracts of a batch."""

    def __init__(self, order: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        self._pairs: list[tuple[str, str]] = order["pairs"]
        self._encoder = Path(order["encoder"])
        self._model = sentence_transformers.SentenceTransformer(str(self._encoder), device="cpu")
        self._model.max_seq_length = order["max_length"]
        adapters = peft.LoraConfig(**order["adapters"])
        self._model[0].model = peft.get_peft_model(self._model[0].model, adapters)
        self._loss = CachedMultipleNegativesRankingLoss(self._model, scale=1 / order["temperature"])
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(trained, weight_decay=order["weight_decay"], fused=True)
        self._model.train()

    def step(self, rows: list[int], learning_rate: float) -> float:
        """A step by the pairs at these rows; the loss."""
        texts = zip(*(self._pairs[row] for row in rows), strict=True)
        features = [self._model.preprocess(list(side)) for side in texts]
        loss = self._loss(features, torch.arange(len(rows)))
        self._optimiser.zero_grad()
        loss.backward()
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        return float(loss)

    def save(self, folder: Path) -> None:
        """Writes the encoder with its adapters merged, as Hugging Face lays it out; this training ends."""
        self._model[0].model.merge_and_unload().save_pretrained(folder)
        shutil.copy(self._encoder / "tokenizer.json", folder)


def main() -> None:
    """Answers until the input ends."""
    order: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(order["threads"])
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    libraries = (sentence_transformers, peft, transformers, torch)
    _say({"version": ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)})
    training: Training | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "seed" in asked:
            training = Training(order, asked["seed"])
            _say({})
            continue
        assert training is not None
        if "folder" in asked:
            training.save(Path(asked["folder"]))
            _say({})
        else:
            _say({"loss": training.step(asked["rows"], asked["learning_rate"])})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
