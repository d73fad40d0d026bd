"""The samples that prove a result, and how they are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slimline.basics.arrays import Array
from slimline.measure.accuracy import Scores
from slimline.measure.certificate import Certificate, certify
from slimline.measure.set_certificate import certify_set
from slimline.measure.set_metrics import SetScores


@dataclass(frozen=True)
class Proof:
    """The certification samples as a certificate counts them.

    Attributes
    ----------
    index : positions in the split of those that count: all but copies of others.
    groups : of these, a name each, or None.
    copies : samples left out.
    keys : of these, hashes of what they are.
    notes : what a reader of the certificate must know of them.
    """

    index: Array
    groups: Array | None
    copies: int
    keys: Array
    notes: tuple[str, ...] = ()

    def certify(
        self,
        original: Scores,
        compressed: Scores,
        max_drop: float | None,
        confidence: float = 0.95,
        *,
        metric: str,
        score_range: tuple[float, float] | Literal["known"] | None,
        seed: int = 0,
        use: int | None = None,
        note: str = "",
        progress: Callable[[float], None] | None = None,
    ) -> Certificate:
        """`slimline.measure.certify` of scores ``(samples of the split,)``, bool if they can only be 0 or 1; of a
        metric of the whole set its bootstrap, which tells its `progress`."""
        notes = (*self.notes, *([note] if note else []))
        if isinstance(original, SetScores):
            assert isinstance(compressed, SetScores)
            return certify_set(
                original[self.index],
                compressed[self.index],
                max_drop,
                confidence,
                seed=seed,
                groups=self.groups,
                copies=self.copies,
                use=use,
                notes=notes,
                progress=progress,
            )
        assert not isinstance(compressed, SetScores)
        return certify(
            original[self.index],
            compressed[self.index],
            max_drop,
            confidence,
            metric=metric,
            seed=seed,
            score_range=score_range,
            binary=original.dtype == bool and compressed.dtype == bool,
            groups=self.groups,
            copies=self.copies,
            use=use,
            notes=notes,
        )
