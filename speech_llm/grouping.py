"""Prompts that begin alike, so that what they share is computed once.

In: prompts as lists of numbers, one a token. Out: groups, with how many tokens each one shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Group:
    """Prompts (by number) whose first `shared` tokens are the same."""

    shared: int
    members: list[int] = field(default_factory=list)

    def shared_from(self, start: int) -> int:
        """Where the prompts' own parts begin; one prompt shares only the first `start` tokens, as all do."""
        return self.shared if len(self.members) > 1 else start


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many leading numbers all rows share, leaving each at least one of its own."""
    if not rows:
        return 0
    first, length = rows[0], min(len(row) for row in rows) - 1
    for row in rows:
        length = next((i for i in range(length) if row[i] != first[i]), length)
    return length


def group_prompts(keys: Sequence[list[int]], start: int, longest: int = 512) -> list[Group]:
    """Groups of prompts that share more than their first `start` numbers, chosen to save the most computation.

    In sorted order a prompt joins the group before it when that saves tokens; no group is longer than `longest`.
    """
    groups: list[Group] = []
    for number in sorted(range(len(keys)), key=lambda i: keys[i]):
        key = keys[number]
        if groups:
            group = groups[-1]
            together = min(group.shared, shared_length([keys[group.members[0]], key]))
            count = len(group.members)
            before, after = (group.shared - start) * (count - 1), (together - start) * count
            size = together - start + sum(len(keys[i]) - together for i in (*group.members, number))
            if after > before and size <= longest:
                group.members.append(number)
                group.shared = together
                continue
        groups.append(Group(len(key) - 1, [number]))
    return groups
