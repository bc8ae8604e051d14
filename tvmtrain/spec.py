"""What a training step is and what it trains: optimizers, layers, update plans. Plain values, standard library only."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tvmtrain.errors import PlanError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SELECTIONS = ("first", "magnitude", "random", "rotate")
SCALINGS = ("unbiased", "paper")


# ---- optimizers ----


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD, with gradient-norm clipping: ``clip_norm`` bounds the 2-norm of all gradients together."""

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check_optimizer(self.lr, self.weight_decay, self.clip_norm)
        _check_range("momentum", self.momentum, 0, 1)
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov=True needs momentum > 0")


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam: weight decay is added to the gradient."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check_adam(self)


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW: weight decay shrinks the parameter, apart from the gradient (Loshchilov and Hutter, 2019)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _check_adam(self)


Optimizer = SGD | Adam | AdamW
OPTIMIZERS: dict[str, type[SGD] | type[Adam] | type[AdamW]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def optimizer_to_dict(optimizer: Optimizer) -> dict[str, Any]:
    """{"kind": "sgd", "lr": 0.01, ...}, for JSON."""
    return {"kind": type(optimizer).__name__.lower(), **asdict(optimizer)}


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name}: got {value}, wanted at least {low} and below {high}")


def _check_optimizer(lr: float, weight_decay: float, clip_norm: float | None) -> None:
    _check_range("lr", lr, 0, math.inf)
    _check_range("weight_decay", weight_decay, 0, math.inf)
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm: got {clip_norm}, wanted a positive number, or None for no clipping")


def _check_adam(optimizer: Adam | AdamW) -> None:
    _check_optimizer(optimizer.lr, optimizer.weight_decay, optimizer.clip_norm)
    for beta in optimizer.betas:
        _check_range("betas", beta, 0, 1)


# ---- layers ----


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own.

    ``macs``: multiply-accumulates of one forward pass of the whole batch (convolutions and linear layers, else 0).
    ``saved_bytes``: bytes of the input that a dense weight gradient keeps until the backward (0 for other kinds).
    """

    name: str
    kind: str  # conv2d, linear, batch_norm, ...: the operator that reads its parameters
    parameters: tuple[str, ...]
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    saved_bytes: int

    @property
    def channels(self) -> int:
        """Input channels of a convolution or linear layer: what a share of its weight is a share of."""
        return self.input_shape[1 if self.kind == "conv2d" else -1]

    def channels_of(self, share: float) -> int:
        """How many channels a share of them is: the nearest whole number, at least one."""
        return max(1, round(share * self.channels))


# ---- update plans ----


@dataclass(frozen=True)
class LayerUpdate:
    """How one layer is trained.

    weight: share of the input channels (channels, for a depthwise convolution) whose weights are trained; 0: the bias alone.
    filter: gradient filtering with patches of r or (r_h, r_w); None: exact gradients.
    select: which channels: "first" or "magnitude" (the same in every step), "random" or "rotate" (others, until all were trained);
    those that a step does not train keep their weights and their optimizer state (``passes.append_optimizer``).
    scaling: of filtered gradients where the stride is more than 1: "unbiased", or the larger ones of the "paper".
    """

    weight: float = 1.0
    bias: bool = True
    filter: int | tuple[int, int] | None = None
    select: str = "first"
    scaling: str = "unbiased"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 <= self.weight <= 1:
            raise PlanError(f"weight: got {self.weight!r}, wanted a share between 0 and 1")
        if not isinstance(self.bias, bool):
            raise PlanError(f"bias: got {self.bias!r}, wanted true or false")
        if self.select not in SELECTIONS:
            raise PlanError(f"select: got {self.select!r}, wanted one of {', '.join(SELECTIONS)}")
        if self.scaling not in SCALINGS:
            raise PlanError(f"scaling: got {self.scaling!r}, wanted one of {', '.join(SCALINGS)}")
        sizes = self.filter if isinstance(self.filter, tuple) and len(self.filter) == 2 else (self.filter,)
        if self.filter is not None and any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in sizes):
            raise PlanError(f"filter: got {self.filter!r}, wanted a positive patch size, a pair of them, or None")

    @property
    def patch(self) -> tuple[int, int] | None:
        """``filter`` as (rows, columns)."""
        return (self.filter, self.filter) if isinstance(self.filter, int) else self.filter


KEYS = tuple(each.name for each in fields(LayerUpdate))


@dataclass(frozen=True)
class UpdatePlan:
    """Layer name -> ``LayerUpdate``. A layer that the plan does not name is frozen."""

    layers: Mapping[str, LayerUpdate] = field(default_factory=dict)

    def check(self, layers: Sequence[Layer]) -> None:
        """Refuse names that are not layers of the model, with near matches."""
        known = [layer.name for layer in layers]
        for name in self.layers:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                hint = f"; near matches: {', '.join(near)}" if near else ""
                raise PlanError(f"update plan: no layer {name!r} in this model ({len(known)} layers){hint}")

    @classmethod
    def full(cls, layers: Iterable[Layer]) -> UpdatePlan:
        """Everything is trained, exactly."""
        return cls({layer.name: LayerUpdate() for layer in layers})

    @classmethod
    def last(
        cls,
        layers: Sequence[Layer],
        n: int,
        *,
        weight: float = 1.0,
        bias: bool = True,
        filter: int | tuple[int, int] | None = None,
        select: str = "first",
        scaling: str = "unbiased",
        batchnorm: bool = False,
    ) -> UpdatePlan:
        """The last ``n`` convolutions, and every linear layer after the first of them, whole and exact.

        ``batchnorm=True``: the BatchNorms after it are trained too.
        """
        convolutions = [i for i, layer in enumerate(layers) if layer.kind.startswith("conv")]
        if not 0 <= n <= len(convolutions):
            raise PlanError(f"last {n} convolutions: this model has {len(convolutions)}")
        start = convolutions[-n] if n else (convolutions[-1] + 1 if convolutions else 0)
        plan: dict[str, LayerUpdate] = {}
        for layer in layers[start:]:
            if layer.kind.startswith("conv"):
                plan[layer.name] = LayerUpdate(weight, bias, filter, select, scaling)
            elif layer.kind == "linear" or (batchnorm and layer.kind == "batch_norm"):
                plan[layer.name] = LayerUpdate()
        return cls(plan)

    # ---- TOML: one table per layer ----

    def to_toml(self) -> str:
        lines = ["# tvmtrain update plan: a layer that is not named is frozen"]
        for name, update in self.layers.items():
            lines += ["", f"[layers.{json.dumps(name)}]"]
            for key, value in asdict(update).items():
                # The usual scaling of exact gradients means nothing.
                if value is not None and (key != "scaling" or update.filter is not None or value != LayerUpdate.scaling):
                    lines.append(f"{key} = {_toml_value(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, source: str | Path) -> UpdatePlan:
        """``source``: a path to a TOML file, or TOML text (text has a newline)."""
        text = source if isinstance(source, str) and "\n" in source else _read(Path(source))
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"update plan: not valid TOML: {error}") from error
        layers = tables.get("layers", {})
        if set(tables) - {"layers"} or not isinstance(layers, dict):
            raise PlanError(f'update plan: got {", ".join(tables)}, wanted one table per layer: [layers."name of the layer"]')
        return cls({name: _update_from(name, table) for name, table in layers.items()})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not a readable update plan: {error}") from error


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _update_from(name: str, table: Mapping[str, Any]) -> LayerUpdate:
    if not isinstance(table, Mapping):
        raise PlanError(f"update plan, layer {name!r}: got {table!r}, wanted a table with {', '.join(KEYS)}")
    unknown = set(table) - set(KEYS)
    if unknown:
        raise PlanError(f"update plan, layer {name!r}: unknown keys {sorted(unknown)}; allowed: {', '.join(KEYS)}")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return LayerUpdate(**given)
