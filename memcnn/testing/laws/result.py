"""The results of a check: one `Result` for each claim, and a `Report` of many."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

MOST_LISTED = 3
"""Maximum number of similar faults to list."""
BADLY_CONDITIONED = "right, but badly conditioned: "
NEEDS_NO_INVERSE = "with keep_input=True, which needs no inverse, it is right"
NOT_DETERMINISTIC = "forward is not deterministic"
TOO_LITTLE = "which is too little to show in float32: look for a cast, a constant, or an iteration that stops early"
WITHIN_LIMIT = "which the limit of float32 allows: look for an iteration that stops early, an eps, or a cast"
FEW_ROUNDINGS = 1e-6
"""Largest error in float64 that a few roundings to float32 can cause."""
HOPELESS = "rounding may be as large as the values: "


def of_float64_alone(error: float) -> str:
    """Explain an error in float64 that the limit of float32 would allow."""
    return TOO_LITTLE if error <= FEW_ROUNDINGS else WITHIN_LIMIT


def is_small(explanation: str) -> bool:
    """Return whether an explanation describes an error that only float64 shows."""
    return TOO_LITTLE in explanation or WITHIN_LIMIT in explanation


@dataclass(frozen=True)
class Result:
    """One claim about a module, the error measured, and the largest error that rounding explains.

    Attributes:
        law: inverse, gradients, state, memory, log_det, training or copies.
        claim: what should hold.
        error: relative to the largest expected entry, or a number of bytes or faults.
        limit: the largest error that still passes.
        limit_from: where the limit comes from.
        explanation: for a failure, what is wrong; for a success, a remark or nothing.
        skipped: why nothing could be measured; such a result neither holds nor fails.
    """

    law: str
    claim: str
    error: float = math.nan
    limit: float = math.nan
    limit_from: str = ""
    explanation: str = ""
    skipped: str = ""

    @property
    def failed(self) -> bool:
        return not self.skipped and not self.error <= self.limit  # an error that is NaN fails

    @property
    def verdict(self) -> str:
        return "SKIP" if self.skipped else "FAIL" if self.failed else "PASS"


@dataclass(frozen=True)
class Report:
    """The results of one or several checks; prints as a table."""

    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """True if a claim was checked, and none failed."""
        return not self.failures and not self.is_undecided

    @property
    def is_undecided(self) -> bool:
        """True if nothing could be checked."""
        return all(result.skipped for result in self.results)

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.failed)

    @property
    def failed_laws(self) -> frozenset[str]:
        return frozenset(result.law for result in self.failures)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __add__(self, other: "Report") -> "Report":
        return Report(self.results + other.results)

    def of(self, law: str) -> "Report":
        return Report(tuple(result for result in self.results if result.law == law))

    def summary(self) -> str:
        """Return one sentence: what holds, and what is wrong."""
        if not self.failures:
            laws = ", ".join(dict.fromkeys(result.law for result in self.results if not result.skipped))
            notes = [r.explanation for r in self.results if r.explanation.startswith(BADLY_CONDITIONED)][:1]
            hopeless = [result for result in self.results if result.skipped.startswith(HOPELESS)]
            if hopeless:
                notes.append(f"undecided: {_some([r.claim for r in hopeless], ', ')}: {hopeless[-1].skipped}")
            holds = "everything that could be checked holds" if hopeless else "all laws hold"
            return "; ".join([f"{holds}: {laws}", *notes]) if laws else "nothing could be checked"
        held = {result.law for result in self.results if not result.skipped} - self.failed_laws
        right = [law for law in ("inverse", "gradients") if law in held]
        beginning = f"the {right[0]} {'is' if right[0] == 'inverse' else 'are'} right, but " if right else ""
        found: list[str] = []
        for words in self._causes():
            if NEEDS_NO_INVERSE in words and "inverse" in self.failed_laws:
                continue  # it follows from the inverse
            if not any(_core(words) in earlier for earlier in found):  # a step that raises fails several laws
                found.append(words)
        return beginning + "; ".join(found)

    def _causes(self) -> list[str]:
        """Return what is wrong, in words: the first failure of each law, but of the law of state several.

        The claims of the law of state do not follow from each other, as those of the other laws do.
        """
        causes = []
        for law in dict.fromkeys(result.law for result in self.failures):
            failures = self.of(law).failures
            large = [result for result in failures if not is_small(result.explanation)]
            several = law == "state" and "inverse" not in self.failed_laws
            causes += [
                r.explanation or f"{r.claim} does not hold: error {r.error:.2g}, limit {r.limit:.2g}"
                for r in (large or failures)[: MOST_LISTED if several else 1]
            ]
        return causes

    def to_dicts(self) -> list[dict]:
        """Return the results with their verdicts, for JSON. Errors that are not finite become text."""

        def plain(value: object) -> object:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return [
            {key: plain(value) for key, value in (asdict(result) | {"verdict": result.verdict}).items()}
            for result in self.results
        ]

    def __str__(self) -> str:
        rows = [
            (r.verdict, r.law, r.claim, "" if r.skipped else f"{r.error:.2g}", "" if r.skipped else f"{r.limit:.2g}")
            for r in self.results
        ]
        header = "", "law", "claim", "error", "limit"
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        remarks: dict[str, str] = {}  # by text: of results that say the same, only the first is shown
        left_out = 0
        same = Counter(_core(r.explanation) for r in self.failures if " raised " in f" {r.explanation}")
        for r in self.results:
            text = r.skipped or r.explanation
            source = f"\n     limit: {r.limit_from}" if r.failed and r.limit_from else ""
            if text and (key := _core(text)) not in remarks:
                if r.failed and sum(remark.startswith("FAIL") for remark in remarks.values()) >= MOST_LISTED:
                    left_out += 1
                    continue
                others = f", and {same[key] - 1} more rows" if r.failed and same[key] > 2 else ""
                remarks[key] = f"{r.verdict} {r.law}, {r.claim}{others}:\n     {text}{source}"
        if left_out:
            rows_left = f"{left_out} more rows fail" if left_out > 1 else "1 more row fails"
            remarks["left out"] = f"{rows_left}, not explained here: correct what is, and run the checks again"
        return "\n".join([*lines, *([""] if remarks else []), *remarks.values()])


def _core(text: str) -> str:
    """Return what identifies an explanation: its cause where it names one, or the exception, wherever it was raised."""
    if " raised " in f" {text}":
        return f" {text}".partition(" raised ")[2].removesuffix(f"; {NEEDS_NO_INVERSE}")
    return next((cause for cause in (NEEDS_NO_INVERSE, NOT_DETERMINISTIC) if cause in text), text)


def nothing_differs(claim: str, faults: Sequence[str]) -> Result:
    """Return the result of a claim of the law of state that holds if there are no ``faults``, each given in words."""
    return Result("state", claim, len(faults), 0, "nothing may differ", _some(list(dict.fromkeys(faults)), "; "))


def _some(words: Sequence[str], separator: str) -> str:
    rest = [f"and {len(words) - MOST_LISTED} more"] if len(words) > MOST_LISTED else []
    return separator.join([*words[:MOST_LISTED], *rest])
