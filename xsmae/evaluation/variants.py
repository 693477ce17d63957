"""Encoders whose features are made in another way than usual.

Tasks use them. The digest stays that of the encoder; `FrozenEncoder.use` tells their
features apart in the cache, the options of the protocol tell their rows apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from xsmae.errors import UserError
from xsmae.evaluation.subjects import FrozenEncoder, encode_by
from xsmae.weights.encoder import Encoder


def standardized(encoder: FrozenEncoder) -> FrozenEncoder:
    """The encoder, with features standardised by the training part."""
    return dataclasses.replace(encoder, standardize=True)


def check_block(encoder: FrozenEncoder, block: int) -> None:
    """Raise UserError if the encoder has no block of this number, counted from 1."""
    if encoder.info is None:
        raise UserError(
            f"block={block}, but encoder={encoder.kind} has no blocks: leave block "
            "out, or give another encoder"
        )
    depth = encoder.info["architecture"]["depth"]
    if not 1 <= block <= depth:
        raise UserError(
            f"block={block}, but {encoder.name} has {depth} blocks: give 1 to {depth}"
        )


def at_block(encoder: FrozenEncoder, block: int) -> FrozenEncoder:
    """The encoder, with features of the tokens of a block, without the final norm.

    Pixel controls have no blocks and stay as they are.
    """
    if encoder.weights is None:
        return encoder
    return dataclasses.replace(
        encoder,
        encode=encode_by(encoder.weights, encoder.reading, block=block),
        use=f"{encoder.use}-block{block}",
    )


def normalized_by(
    encoder: FrozenEncoder, mean: Sequence[float], std: Sequence[float]
) -> FrozenEncoder:
    """The encoder, which normalises images by other numbers than in its training.

    mean, std: of the bands of the images, in their order, in the encoder's units. Bands
    that the images lack keep the encoder's own.
    """
    whole, reading = encoder.weights, encoder.reading
    numbers = {
        name: [
            own if place is None else values[place]
            for own, place in zip(whole.info[name], reading.places, strict=True)
        ]
        for name, values in (("mean", mean), ("std", std))
    }
    how = {"dtype": whole.dtype, "attention": whole.attention}
    other = Encoder(whole.network, {**whole.info, **numbers}, **how)
    reading = dataclasses.replace(reading, bands=other.bands)
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(
        encoder,
        encode=encode_by(other, reading),
        weights=other,
        reading=reading,
        use=f"{encoder.use}-by{digest[:8]}",
    )
