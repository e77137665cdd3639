"""What became of every row that an adapter read: kept, or dropped for a named reason. Nothing
disappears silently.
"""

from collections import Counter
from collections.abc import Hashable, Iterable

KEPT = "kept"


class Ledger:
    """Double-entry bookkeeping: the readers enter a row, an adapter or the writer closes it;
    `table` refuses a row that was not closed.
    """

    def __init__(self, unit: str):
        self.unit = unit  # what a row is: "films", "boxes"
        self.fate: dict[Hashable, str | None] = {}
        self.notes: Counter[str] = Counter()  # what was mended, by name
        self.samples: Counter[str] = Counter()  # what came of the kept rows, by task

    def enter(self, row: Hashable) -> None:
        if row in self.fate:
            raise ValueError(f"row {row!r} was entered twice: a row is (file, line)")
        self.fate[row] = None

    def drop(self, rows: Iterable[Hashable], reason: str) -> None:
        """The first reason counts; a row that another sample keeps stays kept."""
        for row in rows:
            if self.fate[row] is None:
                self.fate[row] = reason

    def keep(self, rows: Iterable[Hashable]) -> None:
        for row in rows:
            if row not in self.fate:
                raise ValueError(f"row {row!r} was kept but never read")
            self.fate[row] = KEPT

    def counts(self) -> dict[str, int]:
        """{"kept": n, reason: n, ...}, the reasons by size; they add up to the rows read."""
        lost = [row for row, fate in self.fate.items() if fate is None]
        if lost:
            raise ValueError(f"{len(lost)} rows were neither kept nor dropped, such as {lost[0]!r}")
        fates = Counter(self.fate.values())
        kept = fates.pop(KEPT, 0)
        return {KEPT: kept} | dict(fates.most_common())

    def table(self) -> str:
        """`counts` and the notes, one per line."""
        rows = [(f"{self.unit} read", len(self.fate))]
        rows += [
            (f"  {name if name == KEPT else f'dropped, {name}'}", count)
            for name, count in self.counts().items()
        ]
        rows += [(f"  note: {name}", count) for name, count in sorted(self.notes.items()) if count]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {count:>11,}" for name, count in rows)
