"""A task: model, loss, metrics, data and an optional proxy set. The user's plug-in point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore import trees
from fedcore.data.federated import Examples, FederatedData
from fedcore.data.sources import Pixels
from fedcore.errors import SettingsError
from fedcore.types import Batches, Params

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(model outputs [B, ...], targets [B, ...]) -> one value an example, [B]."""


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of each example in nats, [B]."""
    if (
        outputs.ndim == 2 and y.ndim == 1
    ):  # the same with half the operations, once it is differentiated and batched
        return -outputs.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """1.0 where the largest output is the class, [B]."""
    return (outputs.argmax(1) == y).to(outputs.dtype)


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance of each example, [B]."""
    return 0.5 * (outputs - y).square().flatten(1).sum(1)


class Task:
    """What is learned, from which data, and how it is judged.

    `loss` and each of `metrics` map (outputs, targets) to one value an example; means over real examples are taken here.
    They may depend on what they are given and on what never changes; on nothing that changes from round to round.
    `proxy` is data that the server holds itself, for methods that need it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: FederatedData,
        loss: PerExample = cross_entropy,
        metrics: dict[str, PerExample] | None = None,
        proxy: Examples | None = None,
        optimum: Params | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        """Raises SettingsError for a model with running statistics, which no mean over clients can be trusted with.

        `metrics` are reported beside the loss; default: accuracy. `pixels` says that inputs are images, and how they were scaled:
        an audit shows and compares pixels.
        """
        for name, meaning in (
            ("loss", "what is trained on"),
            ("nmsd", "the deviation from a known optimum"),
        ):
            if metrics is not None and name in metrics:
                raise SettingsError(
                    f'metrics holds "{name}", which is the name of {meaning}: give it another name'
                )
        for name, module in model.named_modules():
            if getattr(module, "track_running_stats", False):
                raise SettingsError(
                    f'the model\'s "{name}" ({type(module).__name__}) keeps running statistics of its batches, which clients '
                    "cannot share: use GroupNorm, or track_running_stats=False"
                )
        self.model = model
        self.data = data
        self.proxy = proxy
        self.optimum = (
            optimum  # the minimiser of the population's objective, where it is known
        )
        self.pixels = pixels
        self.penalty: Callable[[Callable[[Params], Tensor], Params], Tensor] | None = (
            None  # on the mean loss, at its parameters
        )
        self.metrics = {
            "loss": loss,
            **({"accuracy": accuracy} if metrics is None else metrics),
        }

    @torch.no_grad()
    def check(self) -> None:
        """Try model, loss and metrics on two examples. Raises SettingsError when they do not fit each other."""
        self._try("examples", self.data.x[:2], self.data.y[:2])
        if self.proxy is not None:
            self._try("proxy examples", self.proxy.x[:2], self.proxy.y[:2])

    def _try(self, what: str, x: Tensor, y: Tensor) -> None:
        if len(x) == 0:
            return
        try:
            outputs = self.predict(self.init_params(), x)
        except Exception as e:
            raise SettingsError(
                f"the model cannot take {what} of shape {tuple(x.shape[1:])}: {type(e).__name__}: {e}"
            ) from e
        for name, metric in self.metrics.items():
            try:
                values = metric(outputs, y)
            except Exception as e:
                facts = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(y.shape)}"
                raise SettingsError(
                    f'the metric "{name}" cannot take {facts}: {type(e).__name__}: {e}'
                ) from e
            if values.shape != (len(x),):
                found = f"gives shape {tuple(values.shape)} for {len(x)} examples"
                raise SettingsError(
                    f'the metric "{name}" {found}, expected one value an example: ({len(x)},)'
                )

    @property
    def population(self) -> int:
        return self.data.population

    @property
    def device(self) -> torch.device:
        return self.data.x.device

    def to(self, device: torch.device) -> Task:
        """Move model and data; in place."""
        self.model.to(device)
        self.data.to(device)
        self.proxy = (
            None
            if self.proxy is None
            else Examples(*(v.to(device) for v in self.proxy))
        )
        self.optimum = (
            None
            if self.optimum is None
            else {name: best.to(device) for name, best in self.optimum.items()}
        )
        return self

    def init_params(self) -> Params:
        """The model's trainable parameters as it was built. Copies."""
        return {
            name: p.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Outputs of the model with these parameters, [B, ...]."""
        outputs: Tensor = functional_call(self.model, params, (x,))
        return outputs

    def loss(self, params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Mean loss over the examples where mask [B] is 1, and the penalty that the model has; 0 where there is none. 0-d."""

        def mean(params: Params) -> Tensor:
            value: Tensor = (
                self.metrics["loss"](self.predict(params, x), y) * mask
            ).sum() / mask.sum().clamp(min=1)
            return value

        return (
            mean(params)
            if self.penalty is None
            else mean(params) + self.penalty(mean, params)
        )

    @torch.no_grad()
    def evaluate(self, params: Params, batches: Batches) -> dict[str, Tensor]:
        """The mean of every metric over all real examples of `batches`, each 0-d; and `nmsd`, where the optimum is known."""
        sums = dict.fromkeys(self.metrics, torch.zeros((), device=batches.mask.device))
        for x, y, mask in zip(
            batches.x.unbind(), batches.y.unbind(), batches.mask.unbind(), strict=True
        ):
            outputs = self.predict(params, x)
            sums = {
                name: total + (self.metrics[name](outputs, y) * mask).sum()
                for name, total in sums.items()
            }
        means = {
            name: total / batches.mask.sum().clamp(min=1)
            for name, total in sums.items()
        }
        if (
            self.optimum is not None
        ):  # normalised square deviation |w - w*|^2 / |w*|^2; its mean over clients is the NMSD
            means["nmsd"] = self._deviation(params) / trees.dot(
                trees.double(self.optimum), trees.double(self.optimum)
            )
        return means

    def _deviation(self, params: Params) -> Tensor:
        """Squared distance to the optimum, float64 0-d."""
        assert self.optimum is not None
        own = dict(
            self.model.named_parameters()
        )  # what `params` lacks is personal, and as it was initialised
        away = [
            (params.get(name, own[name]).double() - best.double()).square().sum()
            for name, best in self.optimum.items()
        ]
        return torch.stack(away).sum()

    @torch.no_grad()
    def test(self, params: Params, batch_size: int = 1000) -> dict[str, float]:
        """The mean of every metric over the global test set; and the Euclidean `distance` to the optimum, where it is known."""
        self.model.eval()
        x, y = self.data.test
        ones = torch.ones(len(x), device=x.device)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            batch = Batches(x[rows][None], y[rows][None], ones[rows][None])
            for name, mean in self.evaluate(params, batch).items():
                sums[name] = (
                    sums.get(name, torch.zeros((), device=x.device))
                    + mean * batch.mask.sum()
                )
        sums.pop("nmsd", None)  # the distance says the same
        found = {name: (total / max(len(x), 1)).item() for name, total in sums.items()}
        if self.optimum is not None:
            found["distance"] = self._deviation(params).sqrt().item()
        return found
