"""Where the ranks of a job differ, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def differences(told: Sequence[Mapping[str, Mapping[str, str]]], limit: int = 3) -> list[str]:
    """Where the facts of ranks differ from the first rank's, in words, at most ``limit`` of them.

    Args:
        told: per rank its facts by subject and name.
        limit: most of them.
    """
    found: list[str] = []
    first = told[0]
    for rank, facts in enumerate(told[1:], 1):
        for subject in first.keys() | facts.keys():
            mine, theirs = first.get(subject, {}), facts.get(subject, {})
            names = [n for n in [*mine, *(n for n in theirs if n not in mine)] if mine.get(n) != theirs.get(n)]
            if names:
                name = names[0]
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                found.append(
                    f"rank {rank} has another {subject} than rank 0: {name} is {theirs.get(name, 'absent')}, on rank 0 "
                    f"{mine.get(name, 'absent')}{more}"
                )
    return sorted(found)[:limit]
