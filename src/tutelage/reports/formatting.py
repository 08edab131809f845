"""Numbers as text: percentages, differences, intervals, sizes and times."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

ABSENT = "–"
"""Stands for a figure that was not measured."""


def percent(fraction: float | None, decimals: int = 1) -> str:
    """``0.9132`` as ``91.3 %``."""
    return f"{100 * fraction:.{decimals}f} %" if _is_finite(fraction) else ABSENT


def points(fraction: float | None) -> str:
    """``0.0142`` as ``+1.4``: a difference in percentage points, with a second decimal below 0.05."""
    if not _is_finite(fraction):
        return ABSENT
    value = 100 * fraction
    if abs(value) < 0.005:
        return "0.0"
    return f"{value:+.{1 if abs(value) >= 0.05 else 2}f}".replace("-", "−")


def bounds(difference: Mapping[str, Any]) -> str:
    """``+0.9 to +1.9``."""
    if difference["low"] is None or difference["high"] is None:
        return "one seed: no interval"
    return f"{points(difference['low'])} to {points(difference['high'])}"


def seeds_text(seeds: Sequence[int]) -> str:
    """``Seeds 0, 1, 2``."""
    return f"{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}"


def interval(difference: Mapping[str, Any]) -> str:
    """``95 % interval +0.9 to +1.9, 3 seeds``."""
    if difference["low"] is None or difference["high"] is None:
        return bounds(difference)
    return f"{100 * difference['level']:g} % interval {bounds(difference)}, {difference['n']} seeds"


def plain(value: float | None) -> str:
    """Three decimals: ``0.231``; one from 10 up."""
    return f"{value:.{_decimals(value)}f}" if _is_finite(value) else ABSENT


def percent_spread(spread: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds: ``91.3 ± 0.4 %``."""
    return _spread(spread, 100, 1, " %")


def plain_spread(spread: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds: ``0.231 ± 0.012``."""
    return _spread(spread, 1, None, "")


def _spread(spread: Mapping[str, Any] | None, scale: int, decimals: int | None, unit: str) -> str:
    if spread is None or not _is_finite(spread["mean"]):
        return ABSENT
    decimals = _decimals(spread["mean"]) if decimals is None else decimals
    values = [scale * value for value in (spread["mean"], spread.get("std")) if _is_finite(value)]
    return " ± ".join(f"{value:.{decimals}f}" for value in values) + unit


def count(number: int | None) -> str:
    """``1234567`` as ``1,234,567``."""
    return ABSENT if number is None else f"{number:,}"


def milliseconds(value: float | None) -> str:
    """``1.32 ms``."""
    if not _is_finite(value):
        return ABSENT
    return f"{value:.{3 if value < 0.1 else 2 if value < 10 else 1}f} ms"


def duration(seconds: float | None) -> str:
    """``94.6`` as ``1 min 35 s``."""
    if not _is_finite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def file_size(size: int | None) -> str:
    """``52298000`` as ``52.3 MB``."""
    if size is None:
        return ABSENT
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.{1 if size < 100 * factor else 0}f} {unit}"
    return f"{size} bytes"


def value_text(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def values_text(values: Mapping[str, Any]) -> str:
    """``method.temperature 2.1, method.alpha 0.7``."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in values.items())


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
