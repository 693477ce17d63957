"""The kernels of flash_attention.py, in the Triton dialect of Pallas.

- To `WHOLE_ROW` tokens (fewer where `HELD_...` says so) a program holds all keys and
  values of a head, and so the whole row of scores of a block of queries: no running
  softmax. The keys lie in tiles whose lengths are the binary digits of the sequence's:
  65 tokens are computed as 64 + 16, not as 128. Heads too short to fill a program share
  one, which takes them one after the other.
- Beyond it a program walks over blocks of keys with a running softmax (Milakov and
  Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691), and backward once more over
  blocks of queries.

Each kernel takes its `Plan`, the function for products of blocks, and the arrays.
`x_bar` is the gradient of the loss by x.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)  # GPUs compute powers of two
WHOLE_ROW = 256  # tokens

# Numbers of the keys (tokens times columns) that a program with whole rows may hold, by
# the bytes of a number. Forward, the shared memory of a Hopper's core is the limit;
# backward the registers, which gather the gradients of keys and values in float32.
HELD_FORWARD = {2: 256 * 128, 4: 128 * 64}
HELD_BACKWARD = {2: 128 * 64, 4: 64 * 64}

QUERY, KEY, VALUE = range(3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes that a kernel is compiled for, and those that follow from them."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    itemsize: int
    backward: bool

    @property
    def columns(self) -> int:
        """Of a block: the power of two that holds head_dim."""
        return pl.next_power_of_2(self.head_dim)

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """(first row, rows) of all keys: the binary digits of their sixteens."""
        sixteens, start, tiles = pl.cdiv(self.tokens, 16), 0, []
        for digit in reversed(range(sixteens.bit_length())):
            if sixteens >> digit & 1:
                tiles.append((start, 16 << digit))
                start += 16 << digit
        return tiles

    @property
    def padded(self) -> int:
        """Tokens of the tiles."""
        return sum(self.tiles[-1])

    @property
    def whole(self) -> bool:
        """Whether a program holds whole rows of scores."""
        held = HELD_BACKWARD if self.backward else HELD_FORWARD
        fits = self.padded * self.columns <= held[self.itemsize]
        return fits and self.tokens <= WHOLE_ROW

    @property
    def rows(self) -> int:
        """Of a block of queries, and of one of keys where a softmax is running."""
        if not self.whole:
            return 64 if self.itemsize == 2 else 32
        if self.padded > 64 and (self.backward or self.itemsize == 4):
            return 32  # with 64, registers were spilled for an H200
        if self.tokens > 128:
            return 64
        # What pads the sequence less.
        return min((64, 32), key=lambda rows: pl.cdiv(self.tokens, rows) * rows)

    @property
    def blocks(self) -> int:
        """Of queries, in a sample."""
        return pl.cdiv(self.tokens, self.rows)

    @property
    def heads(self) -> int:
        """Of a program with whole rows: about 128 tokens' worth."""
        most = max(1, 128 // self.padded)
        return max(n for n in range(1, most + 1) if self.num_heads % n == 0)

    @property
    def grid(self) -> tuple[int, ...]:
        # What lies in the same lines of memory is next to each other: a sample's heads.
        if self.whole:
            return self.num_heads // self.heads, self.batch
        return self.blocks, self.num_heads, self.batch

    @property
    def num_warps(self) -> int:
        """A warp for 16 queries; backward enough for 64 gradients a thread.

        Twice as many in float32. With fewer, registers were spilled too.
        """
        warps = self.rows // 16
        if self.backward:
            keys = self.padded if self.whole else self.rows
            warps = max(warps, pl.next_power_of_2(pl.cdiv(keys * self.columns, 1024)))
        return min(8, warps * self.itemsize // 2)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class _Head:
    """One head of one sample: where its blocks lie in the arrays."""

    plan: Plan
    sample: jax.Array
    index: jax.Array

    def _block(self, ref, part, start, rows):
        """The part of `ref`, and which of its numbers are the head's."""
        plan = self.plan
        row = (start + jnp.arange(rows))[:, None]
        column = jnp.arange(plan.columns)[None, :]
        mask = (row < plan.tokens) & (column < plan.head_dim)
        column += (part * plan.num_heads + self.index) * plan.head_dim
        return ref.at[self.sample, row, column], mask

    def load(self, ref, start, rows, part=QUERY):
        """[rows, columns] from token `start` on; zero where there are none."""
        block, mask = self._block(ref, part, start, rows)
        return plgpu.load(block, mask=mask, other=0.0)

    def store(self, ref, start, rows, values, part=QUERY):
        block, mask = self._block(ref, part, start, rows)
        plgpu.store(block, values.astype(ref.dtype), mask=mask)

    def load_rows(self, ref, start, rows):
        """[rows] of a [batch, heads, tokens] array; zero where there are none."""
        row = start + jnp.arange(rows)
        block, mask = ref.at[self.sample, self.index, row], row < self.plan.tokens
        return plgpu.load(block, mask=mask, other=0.0)

    def store_rows(self, ref, start, rows, values):
        row = start + jnp.arange(rows)
        block, mask = ref.at[self.sample, self.index, row], row < self.plan.tokens
        plgpu.store(block, values, mask=mask)

    def is_key(self, start, rows):
        """[1, rows]: whether there is a key from token `start` on."""
        return (start + jnp.arange(rows) < self.plan.tokens)[None, :]


def forward_whole(plan, dot, qkv_ref, out_ref, *lse_ref):
    scale = plan.scale * LOG2_E

    def one_head(head):
        keys = [head.load(qkv_ref, *tile, KEY) for tile in plan.tiles]
        values = [head.load(qkv_ref, *tile, VALUE) for tile in plan.tiles]

        def one_block(block, _):
            rows = (block * plan.rows, plan.rows)
            query = head.load(qkv_ref, *rows)
            scores = [
                jnp.where(head.is_key(*tile), dot(query, key, (1, 1)), -jnp.inf)
                for tile, key in zip(plan.tiles, keys, strict=True)
            ]
            top = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores])
            weights = [jnp.exp2((x - top[:, None]) * scale) for x in scores]
            total = sum(x.sum(axis=1) for x in weights)
            out = sum(
                dot(weight.astype(value.dtype), value)
                for weight, value in zip(weights, values, strict=True)
            )
            head.store(out_ref, *rows, out / total[:, None])
            for ref in lse_ref:
                head.store_rows(ref, *rows, top * scale + jnp.log2(total))

        _loop(plan.blocks, one_block, None)

    _for_each_head(plan, one_head)


def forward_running(plan, dot, qkv_ref, out_ref, *lse_ref):
    scale = plan.scale * LOG2_E
    head = _Head(plan, pl.program_id(2), pl.program_id(1))
    rows = (pl.program_id(0) * plan.rows, plan.rows)
    query = head.load(qkv_ref, *rows)

    def one_block(block, carry):
        out, top, total = carry
        tile = (block * plan.rows, plan.rows)
        key = head.load(qkv_ref, *tile, KEY)
        value = head.load(qkv_ref, *tile, VALUE)
        scores = jnp.where(head.is_key(*tile), dot(query, key, (1, 1)), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2((scores - new_top[:, None]) * scale)
        shrink = jnp.exp2((top - new_top) * scale)
        out = out * shrink[:, None] + dot(weights.astype(value.dtype), value)
        return out, new_top, total * shrink + weights.sum(axis=1)

    out, top, total = _loop(
        plan.blocks,
        one_block,
        (
            jnp.zeros((plan.rows, plan.columns), jnp.float32),
            jnp.full((plan.rows,), -jnp.inf, jnp.float32),
            jnp.zeros((plan.rows,), jnp.float32),
        ),
    )
    head.store(out_ref, *rows, out / total[:, None])
    for ref in lse_ref:
        head.store_rows(ref, *rows, top * scale + jnp.log2(total))


def backward_whole(plan, dot, qkv_ref, lse_ref, out_bar_ref, qkv_bar_ref):
    def one_head(head):
        keys = [head.load(qkv_ref, *tile, KEY) for tile in plan.tiles]
        values = [head.load(qkv_ref, *tile, VALUE) for tile in plan.tiles]

        def one_block(block, bars):
            rows = (block * plan.rows, plan.rows)
            query = head.load(qkv_ref, *rows)
            out_bar = head.load(out_bar_ref, *rows)
            lse = head.load_rows(lse_ref, *rows)
            weights = [
                _weights(head, dot, query, key, lse, tile)
                for tile, key in zip(plan.tiles, keys, strict=True)
            ]
            weight_bars = [dot(out_bar, value, (1, 1)) for value in values]
            pairs = list(zip(weights, weight_bars, strict=True))
            mean = sum((x * x_bar).sum(axis=1) for x, x_bar in pairs)
            query_bar, new_bars = 0.0, []
            for (x, x_bar), key, (key_bar, value_bar) in zip(
                pairs, keys, bars, strict=True
            ):
                score_bar = (x * (x_bar - mean[:, None])).astype(key.dtype)
                query_bar += dot(score_bar, key)
                key_bar += dot(score_bar, query, (0, 0))
                value_bar += dot(x.astype(key.dtype), out_bar, (0, 0))
                new_bars.append((key_bar, value_bar))
            head.store(qkv_bar_ref, *rows, query_bar * plan.scale)
            return new_bars

        zeros = [jnp.zeros((rows, plan.columns), jnp.float32) for _, rows in plan.tiles]
        bars = _loop(plan.blocks, one_block, [(x, x) for x in zeros])
        for tile, (key_bar, value_bar) in zip(plan.tiles, bars, strict=True):
            head.store(qkv_bar_ref, *tile, key_bar * plan.scale, KEY)
            head.store(qkv_bar_ref, *tile, value_bar, VALUE)

    _for_each_head(plan, one_head)


def backward_running(plan, dot, qkv_ref, out_ref, lse_ref, out_bar_ref, qkv_bar_ref):
    head = _Head(plan, pl.program_id(2), pl.program_id(1))
    own = (pl.program_id(0) * plan.rows, plan.rows)

    def load_queries(rows):
        query, out_bar = head.load(qkv_ref, *rows), head.load(out_bar_ref, *rows)
        out = head.load(out_ref, *rows).astype(jnp.float32)
        mean = (out * out_bar.astype(jnp.float32)).sum(axis=1)
        return query, out_bar, head.load_rows(lse_ref, *rows), mean

    def load_keys(tile):
        return head.load(qkv_ref, *tile, KEY), head.load(qkv_ref, *tile, VALUE)

    def weights_and_score_bar(queries, keys, tile):
        (query, out_bar, lse, mean), (key, value) = queries, keys
        weights = _weights(head, dot, query, key, lse, tile)
        score_bar = weights * (dot(out_bar, value, (1, 1)) - mean[:, None])
        return weights.astype(query.dtype), score_bar.astype(query.dtype)

    def over_queries(keys, block, carry):
        key_bar, value_bar = carry
        query, out_bar, *_ = queries = load_queries((block * plan.rows, plan.rows))
        weights, score_bar = weights_and_score_bar(queries, keys, own)
        return (
            key_bar + dot(score_bar, query, (0, 0)),
            value_bar + dot(weights, out_bar, (0, 0)),
        )

    def over_keys(queries, block, query_bar):
        tile = (block * plan.rows, plan.rows)
        keys = load_keys(tile)
        _, score_bar = weights_and_score_bar(queries, keys, tile)
        return query_bar + dot(score_bar, keys[0])

    zeros = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    key_bar, value_bar = _loop(
        plan.blocks, functools.partial(over_queries, load_keys(own)), (zeros, zeros)
    )
    head.store(qkv_bar_ref, *own, key_bar * plan.scale, KEY)
    head.store(qkv_bar_ref, *own, value_bar, VALUE)
    query_bar = _loop(
        plan.blocks, functools.partial(over_keys, load_queries(own)), zeros
    )
    head.store(qkv_bar_ref, *own, query_bar * plan.scale)


def _weights(head, dot, query, key, lse, tile):
    """The softmax of a block of scores, from the log-sum-exp of its rows."""
    scores = dot(query, key, (1, 1)) * (head.plan.scale * LOG2_E)
    return jnp.where(head.is_key(*tile), jnp.exp2(scores - lse[:, None]), 0.0)


def _for_each_head(plan, one_head):
    """Those of a program with whole rows."""
    first, sample = pl.program_id(0) * plan.heads, pl.program_id(1)

    def body(index, _):
        one_head(_Head(plan, sample, first + index))

    _loop(plan.heads, body, None)


def _loop(count, body, carry):
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)
