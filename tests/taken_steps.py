"""Steps of a training, and what they make of the gradients; as a program, in each process that torchrun starts.

Deliberately does not know what they should be.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_runs import run

from trainer import losses
from trainer.config import TrainerConfig
from trainer.likes import Likes
from trainer.model import TwoTowers
from trainer.negatives import Sources
from trainer.optimisers import Optimisers
from trainer.ranks import ALONE, Ranks, joined
from trainer.run import prepare
from trainer.step import StepFigures, backward
from trainer.train import embed_items

NUM_ROWS = 61


def take_steps(
    config: TrainerConfig, folder: Path, num_rows: int = NUM_ROWS, num_steps: int = 2, ranks: Ranks = ALONE
) -> tuple[StepFigures, dict[str, Tensor]]:
    """Figures of the last of some steps over the toy world's first rows, and the sum of their gradients, dense."""
    prepared = prepare(config, folder)
    torch.manual_seed(0)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model).train()
    temperature = losses.Temperature(0.1, is_learned=True)
    Optimisers(model, temperature, config.training)
    examples, num_items = prepared.examples, len(prepared.item_counts)
    users = examples.queries.users
    likes = Likes.of(users, examples.positives, int(users.max()) + 1, num_items)
    sources = Sources(examples.log_q, config.model.dim, config.training)
    trained = nn.ModuleDict({"towers": model, "temperature": temperature})
    gradients: dict[str, Tensor] = {}
    for step, rows in enumerate(torch.tensor_split(torch.arange(min(num_rows, len(examples.queries))), num_steps)):
        if sources.is_index_due(step):
            sources.index(embed_items(model.item, prepared.items))
            model.train()
        trained.zero_grad()
        figures = backward(
            model, temperature, prepared.items, examples, rows, sources, likes, likes, config.training, 0, step, ranks
        )
        for name, parameter in trained.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad.to_dense()
    return figures, gradients


def main() -> None:
    """For each configuration in a file, the figures and gradients of each process; then one is trained in full."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    trained = TrainerConfig.model_validate_json(Path(sys.argv[3]).read_text())
    torch.set_num_threads(1)
    with joined() as ranks:
        for number, (config, num_rows) in enumerate(cases):
            parsed = TrainerConfig.model_validate_json(json.dumps(config))
            figures, gradients = take_steps(parsed, folder, num_rows, ranks=ranks)
            path = folder / f"{number}.{ranks.rank}"
            save_file(gradients, path.with_name(f"{path.name}.safetensors"))
            path.with_name(f"{path.name}.json").write_text(json.dumps(asdict(figures)))
        run(trained, folder, folder / "trained", ranks=ranks)


if __name__ == "__main__":
    main()
