"""Pools the tokens of an encoder to one vector per image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Array, Float

POOLINGS = ("cls", "mean")


def pool(
    tokens: Float[Array, "batch tokens width"], pooling: str
) -> Float[Array, "batch width"]:
    """`cls`: the class token, which comes first. `mean`: the mean of the others."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}, expected one of {', '.join(POOLINGS)}")
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(axis=1)
