"""Fit the constants of the time model on the rows marked ``use: fit``, and print them beside those in use. Changes no file.

python -m benchmarks.fit_efficiency     exit code 1 when the constants in use are not those that the rows give
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.published import Row, rows
from launcher.hardware.step import FITTED, Fitted
from launcher.preset.hardware import Hardware
from launcher.preset.reading import read_hardware

ROUNDS = 40
DIGITS = 3


@dataclass(frozen=True)
class Constant:
    """One number that is fitted."""

    name: str
    low: float
    high: float
    hardware: tuple[str, ...] = ()
    """Files of presets/hardware that hold it as ``gpu.efficiency.tensor``."""
    field: str | None = None
    """Where ``Fitted`` holds it."""

    @property
    def where(self) -> str:
        files = [f"presets/hardware/{name}.yaml" for name in self.hardware]
        return ", ".join([*files, *([f"Fitted.{self.field}"] if self.field else [])])


CONSTANTS = (
    Constant("tensor cores, A100", 0.2, 1.0, ("a100-40gb", "a100-80gb"), "tensor"),
    Constant("tensor cores, A6000", 0.05, 1.0, ("a6000",)),
    Constant("tensor cores, H100 and H200", 0.2, 1.0, ("h100", "h200")),
    Constant("CUDA cores in fp32, all kinds", 0.3, 1.0, (), "fp32"),
    Constant("xformers attention", 0.05, 1.0, (), "xformers_attention"),
    Constant("launch, s per layer and micro step", 0.0001, 0.005, (), "launch_s_per_layer"),
)


def fit() -> dict[str, float]:
    """Constant → value of least squared logarithmic deviation over the rows for fitting, to three digits."""
    chosen = [row for row in rows() if row.use == "fit"]
    values = {constant.name: math.sqrt(constant.low * constant.high) for constant in CONSTANTS}
    for _ in range(ROUNDS):  # one after the other until nothing moves: each alone has one minimum
        for constant in CONSTANTS:
            values[constant.name] = _minimum(lambda x, name=constant.name: _misfit({**values, name: x}, chosen), constant)  # type: ignore[misc]
    return {name: _rounded(value) for name, value in values.items()}


def in_use() -> dict[str, float]:
    """The same constants as files and code have them; nan where files disagree."""
    found = {}
    for constant in CONSTANTS:
        held = {_tensor(read_hardware(name).value) for name in constant.hardware}
        if constant.field is not None:
            held.add(getattr(FITTED, constant.field))
        found[constant.name] = held.pop() if len(held) == 1 else math.nan
    return found


def _tensor(hardware: Hardware) -> float:
    assert hardware.gpu is not None
    return hardware.gpu.efficiency.tensor or math.nan


def _misfit(values: Mapping[str, float], chosen: list[Row]) -> float:
    fitted = Fitted(**{constant.field: values[constant.name] for constant in CONSTANTS if constant.field is not None})
    return sum(math.log(row.parts(fitted, _with(row.hardware, values)).total_s / row.published_s) ** 2 for row in chosen)


def _with(hardware: Hardware, values: Mapping[str, float]) -> Hardware:
    assert hardware.gpu is not None
    kind = hardware.gpu.kind
    tensor = next((values[constant.name] for constant in CONSTANTS if kind in constant.hardware), None)
    efficiency = hardware.gpu.efficiency.model_copy(update={"tensor": tensor, "fp32": None})
    return hardware.model_copy(update={"gpu": hardware.gpu.model_copy(update={"efficiency": efficiency})})


def _minimum(of: Callable[[float], float], constant: Constant) -> float:
    """Golden section on a logarithmic scale."""
    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(constant.low), math.log(constant.high)
    for _ in range(28):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if of(math.exp(left)) < of(math.exp(right)):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def _rounded(value: float) -> float:
    return round(value, DIGITS - 1 - math.floor(math.log10(value)))


def main() -> int:
    new, old = fit(), in_use()
    chosen = [row.name for row in rows() if row.use == "fit"]
    print(f"{len(new)} constants, fitted on {len(chosen)} of {len(rows())} rows: {', '.join(chosen)}")
    for constant in CONSTANTS:
        print(f"{constant.name:36} {new[constant.name]:<9} in use {old[constant.name]:<9} {constant.where}")
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main())
