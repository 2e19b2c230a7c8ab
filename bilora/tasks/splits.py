"""Which examples are trained on and which are held out: deterministic, stratified, without leaks."""

from collections.abc import Sequence

import torch

from bilora.seeds import generator_for


def normalised(text: str) -> str:
    """The text without case and spacing: two examples with the same one count as the same text."""
    return " ".join(text.casefold().split())


def unseen(texts: Sequence[str], others: Sequence[str] = ()) -> list[int]:
    """Indices of ``texts``, in order, without those that repeat an earlier one or occur in ``others``."""
    seen = {normalised(text) for text in others}
    kept = []
    for i, text in enumerate(texts):
        key = normalised(text)
        if key not in seen:
            seen.add(key)
            kept.append(i)
    return kept


def stratified_order(labels: Sequence[int], seed: int, purpose: str) -> list[int]:
    """A random order of the examples in which every prefix has the classes in their overall proportion.

    Each class is shuffled and spread evenly over [0, 1); sorting by position interleaves them. A longer prefix holds
    the shorter one, so that asking for more examples keeps those there were.

    Args:
        labels: class id of each example; all equal for unlabelled text.
        seed: seed of the shuffle.
        purpose: what the order is for, so that different uses of one seed are independent.

    Returns:
        The indices 0..len(labels)-1 in that order.
    """
    generator = generator_for(seed, "examples", purpose)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    places: list[tuple[float, int, int]] = []
    for label in sorted(members):
        group = members[label]
        shuffled = torch.randperm(len(group), generator=generator).tolist()
        places += [((rank + 0.5) / len(group), label, group[i]) for rank, i in enumerate(shuffled)]
    return [i for _, _, i in sorted(places)]
