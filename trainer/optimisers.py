"""Optimisers of a training: AdamW for layers and encoders, for embedding tables that or row-wise Adagrad.

Deliberately does not know losses, batches or files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.losses import Temperature
from trainer.model import TwoTowers
from trainer.tables import Table, summed_rows
from trainer.text import trained_parameters

_EPSILON = 1e-8

Moments = Mapping[str, Mapping[str, Tensor]]
"""What an optimiser keeps of each parameter, by the parameter's name."""


class RowwiseAdagrad:
    """Adagrad with one learning rate for each row of a table: of a step it costs what the batch reads, not the table.

    Duchi et al. 2011, "Adaptive subgradient methods", with the mean of a row's squared gradients for the squares of
    each (Naumov et al. 2019, "Deep learning recommendation model", whose tables are trained so): a float of memory
    for each row, where Adam takes two for each parameter. A row that no batch reads stays as it is.
    """

    def __init__(self, tables: Sequence[nn.Parameter]) -> None:
        """Before the first step.

        Args:
            tables: `[R, E]` each, whose gradients are sparse.
        """
        self.state: dict[Tensor, dict[str, Tensor]] = {table: {"sum": table.new_zeros(len(table))} for table in tables}
        """Of each table, `[R]` the sum over steps of the mean of a row's squared gradients."""

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Takes a step down the gradients that the tables have.

        Args:
            learning_rate: Of all rows, before it is divided by the root of their sums.
        """
        for table, moments in self.state.items():
            if table.grad is None:
                continue
            rows, gradients = summed_rows(table.grad)  # [U], [U, E]
            sums = moments["sum"][rows] + gradients.square().mean(dim=1)
            moments["sum"][rows] = sums
            table.index_add_(0, rows, gradients * (-learning_rate / (sums.sqrt() + _EPSILON)).unsqueeze(1))


class Optimisers:
    """Those of all parameters that a training changes."""

    def __init__(self, model: TwoTowers, temperature: Temperature, options: TrainingConfig) -> None:
        """Before the first step; makes the gradients of the tables what their optimiser takes.

        Args:
            model: Both towers.
            temperature: Of the softmax.
            options: Say which optimisers, and how their learning rates differ.
        """
        tables = [module for module in model.modules() if isinstance(module, Table)]
        is_rowwise = options.table_optimiser == "adagrad"
        for table in tables:
            table.sparse = is_rowwise
        rows = [parameter for table in tables for parameter in table.parameters()]
        layers, encoders = trained_parameters(model)
        rest = [parameter for parameter in layers if parameter not in set(rows)]
        self._table_share = (options.table_learning_rate or options.learning_rate) / options.learning_rate
        encoder_share = (options.encoder_learning_rate or options.learning_rate) / options.learning_rate
        decay = options.weight_decay
        self._adamw = torch.optim.AdamW(
            [
                {"params": rest, "weight_decay": decay, "share": 1.0},
                {"params": [] if is_rowwise else rows, "weight_decay": decay, "share": self._table_share},
                {"params": encoders, "weight_decay": decay, "share": encoder_share},
                {"params": [*temperature.parameters()], "weight_decay": 0.0, "share": 1.0},
            ],
            lr=options.learning_rate,
            fused=True,
        )
        self._adagrad = RowwiseAdagrad(rows if is_rowwise else [])
        named = nn.ModuleDict({"towers": model, "temperature": temperature}).named_parameters()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for parameter in self._names:
            parameter.grad = None

    def step(self, learning_rate: float) -> None:
        """Takes a step down the gradients.

        Args:
            learning_rate: Of layers; those of tables and encoders are in proportion to it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["share"]
        self._adamw.step()
        self._adagrad.step(learning_rate * self._table_share)

    def moments(self) -> Moments:
        """All that the next step depends on besides parameters and gradients."""
        states = [*self._adamw.state.items(), *self._adagrad.state.items()]
        return {self._names[parameter]: dict(moments) for parameter, moments in states}

    def restore(self, moments: Moments) -> None:
        """Goes on from the moments of optimisers with the same options."""
        for parameter, name in self._names.items():
            if name in moments:
                optimiser = self._adagrad if parameter in self._adagrad.state else self._adamw
                optimiser.state[parameter] = dict(moments[name])
