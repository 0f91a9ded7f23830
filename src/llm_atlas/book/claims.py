"""Figures that others quote, measured: `claim("ffn-4x", 2.67)` says held, partly or not here.

Every figure of the concept tables (0.1%, 10,000x, 2-4x, 93% ...) has a row in assets/claims.yml: the claim in
our own words, where it comes from, what that source really says, and the thresholds fixed before the
measurement. Not reproducing a claim is a result, so each verdict has its reason written beside it.
"""

import difflib
import math
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from llm_atlas.book.concepts import load_concepts, read_yaml
from llm_atlas.core.assets import bundled

__all__ = ["KINDS", "Claim", "ClaimVerdict", "claim", "judge", "load_claims"]

Outcome = Literal["held", "partly", "not here"]
KINDS = ("at_least", "at_most", "about", "ratio", "range", "boolean", "category")
_STATES = ("planned", "measured")
NOTHING = "nothing"
"""What is printed as measured where a measurement needs what this book does not have."""
_BETWEEN = ("about", "ratio", "range")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row. `held` and `partly` are thresholds in the sense of `kind`:

    at_least, at_most: one number; about, ratio, range: the lowest and highest value; boolean: held is true or
    false; category: lists of words. `digits` significant digits are printed, so that the verdict reads the
    same on every machine. `cell` is `chapter#target` of the measurement, `measured_on` what was measured.
    """

    id: str
    concept: str
    chapter: str
    statement: str
    figure: str
    source: str
    note: str
    kind: str
    held: Any
    partly: Any = None
    unit: str = ""
    digits: int = 3
    reasons: dict[str, str]
    state: str = "planned"
    cell: str
    measured_on: str = ""


@dataclass(frozen=True, repr=False)
class ClaimVerdict:
    """What `claim` found: `outcome` is held, partly or not here. True only when held."""

    claim: Claim
    outcome: Outcome
    value: float | bool | str | None
    on: str

    def __bool__(self) -> bool:
        return self.outcome == "held"

    @property
    def reason(self) -> str:
        return self.claim.reasons.get(self.outcome, "")

    @property
    def measured(self) -> str:
        """The value as it is printed: rounded by the row's own rule, with its unit."""
        if self.value is None:
            return NOTHING
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if isinstance(self.value, str):
            return self.value
        return f"{_rounded(self.value, self.claim.digits)} {self.claim.unit}".strip()

    def __repr__(self) -> str:
        lines = [f"{self.claim.id}: {self.outcome}"]
        for what, text in (
            ("claimed", f"{self.claim.figure}: {self.claim.statement}"),
            ("measured", self.measured + (f", on {self.on}" if self.on else "")),
            ("because", self.reason),
        ):
            if text:
                lines.append(
                    textwrap.fill(text, 80, initial_indent=f"  {what:10}", subsequent_indent=" " * 12)
                )
        return "\n".join(lines)


def _rounded(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0 or 1e-4 <= abs(rounded) < 1e9:
        decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0) if rounded else 0
        text = f"{rounded:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{rounded:.{digits - 1}e}"


def _number(row: Claim, name: str, where: str) -> None:
    value = getattr(row, name)
    wanted = 2 if row.kind in _BETWEEN else 1
    numbers = value if isinstance(value, list) else [value]
    typed = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in numbers)
    if len(numbers) != wanted or isinstance(value, list) != (wanted == 2) or not typed:
        shape = "two numbers, lowest and highest" if wanted == 2 else "one number"
        raise ValueError(f"{where}: {name} of {row.id!r} must be {shape} for kind {row.kind}, not {value!r}")
    if wanted == 2 and numbers[0] >= numbers[1]:
        raise ValueError(f"{where}: {name} of {row.id!r} must rise, not {value!r}")


def _check_row(row: Claim, where: str) -> None:
    if row.kind not in KINDS:
        raise ValueError(f"{where}: kind {row.kind!r} of {row.id!r} is none of {', '.join(KINDS)}")
    if row.state not in _STATES:
        raise ValueError(f"{where}: state {row.state!r} of {row.id!r} is none of {', '.join(_STATES)}")
    if not isinstance(row.digits, int) or not 1 <= row.digits <= 6:
        raise ValueError(f"{where}: digits of {row.id!r} must be 1 to 6, not {row.digits!r}")
    for name in ("statement", "figure", "source", "note", "cell"):
        if not isinstance(getattr(row, name), str) or not getattr(row, name).strip():
            raise ValueError(f"{where}: {name} of {row.id!r} must be text")
    if row.kind == "boolean":
        if not isinstance(row.held, bool) or row.partly is not None:
            raise ValueError(
                f"{where}: held of {row.id!r} must be true or false, without partly, for kind boolean"
            )
    elif row.kind == "category":
        words = [*(row.held or []), *(row.partly or [])] if isinstance(row.held, list) else [None]
        if not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
            raise ValueError(f"{where}: held and partly of {row.id!r} must be lists of different words")
    else:
        _number(row, "held", where)
        if row.partly is not None:
            _number(row, "partly", where)
            wider = {
                "at_least": lambda: row.partly < row.held,
                "at_most": lambda: row.partly > row.held,
            }.get(row.kind, lambda: row.partly[0] <= row.held[0] and row.held[1] <= row.partly[1])
            if not wider():
                raise ValueError(f"{where}: partly of {row.id!r} must be wider than held, not {row.partly!r}")
    unknown = set(row.reasons) - {"held", "partly", "not here"}
    if unknown or not all(isinstance(text, str) and text for text in row.reasons.values()):
        raise ValueError(f"{where}: reasons of {row.id!r} must be texts under held, partly, not here")
    if "not here" not in row.reasons:
        raise ValueError(f"{where}: {row.id!r} has no reason for 'not here'")


@lru_cache(maxsize=8)
def _load(path: Path) -> dict[str, Claim]:
    concepts = load_concepts()
    claims: dict[str, Claim] = {}
    for entry in read_yaml(path):
        where = f"{path.name}:{entry['__line__']}"
        values = {key: value for key, value in entry.items() if key != "__line__"}
        values["reasons"] = {k: v for k, v in (values.get("reasons") or {}).items() if k != "__line__"}
        unknown = set(values) - set(Claim.__dataclass_fields__)
        if unknown:
            raise ValueError(f"{where}: unknown field {min(unknown)!r}")
        try:
            row = Claim(**values)
        except TypeError as error:
            raise ValueError(f"{where}: {str(error).partition(') ')[2] or error}") from None
        _check_row(row, where)
        if row.id in claims:
            raise ValueError(f"{where}: claim {row.id!r} stands twice")
        if row.concept not in concepts:
            raise ValueError(f"{where}: claim {row.id!r} belongs to {row.concept!r}, which is no concept")
        if row.chapter != concepts[row.concept].chapter:
            raise ValueError(
                f"{where}: claim {row.id!r} is in {row.chapter!r}, "
                f"its concept in {concepts[row.concept].chapter!r}"
            )
        claims[row.id] = row
    return claims


def load_claims(path: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in the book's order; ValueError naming file and line where a row breaks a rule."""
    return dict(_load(path or bundled("claims.yml")))


def judge(row: Claim, value: Any) -> Outcome:
    """The verdict of a row's limits on a value of its kind."""
    if value is None:
        return "not here"
    if row.kind == "boolean":
        return "held" if value is row.held else "not here"

    def within(limit: Any) -> bool:
        if limit is None:
            return False
        if row.kind == "category":
            return value in limit
        if row.kind == "at_least":
            return value >= limit
        if row.kind == "at_most":
            return value <= limit
        return limit[0] <= value <= limit[1]

    return "held" if within(row.held) else "partly" if within(row.partly) else "not here"


def _typed(row: Claim, value: Any) -> float | bool | str | None:
    if value is None:
        return None
    # torch and numpy scalars
    if hasattr(value, "item"):
        if getattr(value, "ndim", 0):
            raise TypeError(f"claim {row.id!r} takes one value, not shape {tuple(value.shape)}")
        value = value.item()
    if row.kind == "boolean":
        if not isinstance(value, bool):
            raise TypeError(f"claim {row.id!r} takes True or False, not {value!r}")
        return value
    if row.kind == "category":
        if not isinstance(value, str):
            raise TypeError(f"claim {row.id!r} takes a word, not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"claim {row.id!r} takes a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"claim {row.id!r} takes a finite number, not {value!r}")
    return float(value)


def claim(claim_id: str, value: Any, *, on: str = "") -> ClaimVerdict:
    """Judge a measured `value` against the claim's thresholds; None where nothing could be measured ("not here").

    `on` says what was measured, where the row's own `measured_on` does not fit. Numbers may be Python, NumPy
    or torch scalars. ValueError for an unknown claim or a number that is not finite, TypeError for a value of
    the wrong kind.
    """
    claims = load_claims()
    if claim_id not in claims:
        close = difflib.get_close_matches(str(claim_id), claims, n=3)
        meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"no claim is called {claim_id!r}{meant}")
    row = claims[claim_id]
    typed = _typed(row, value)
    return ClaimVerdict(row, judge(row, typed), typed, on or row.measured_on)
