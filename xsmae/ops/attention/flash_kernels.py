"""The kernels of flash_attention.py, in the Triton dialect of Pallas.

- If a plan is `whole`, a program holds all keys and values of a head, and so the whole
  rows of scores of a block of queries. It needs no running softmax. The keys are cut
  into tiles that follow the binary digits of the length: 65 tokens are computed as
  64 + 16, not as 128. Several short heads share a program, which processes them one
  after the other.
- Otherwise a program loops over blocks of keys with a running softmax (Milakov and
  Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). The backward kernel also loops
  over blocks of queries.

Each kernel takes its `Plan` (flash_plan.py), the function for products of blocks, and
the arrays. `x_bar` is the gradient of the loss with respect to x.
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

from xsmae.ops.attention.flash_plan import Block, Plan

LOG2_E = math.log2(math.e)  # GPUs compute powers of two
QUERY, KEY, VALUE = range(3)


@dataclasses.dataclass(frozen=True)
class _Head:
    """One head of one sample, and the positions of its blocks in the arrays."""

    plan: Plan
    sample: jax.Array
    index: jax.Array

    def _numbers(self, ref, part, block):
        """The part of `ref` and a mask of the head's numbers; mask None means all."""
        plan, mask = self.plan, None
        row = (block.start + jnp.arange(block.rows))[:, None]
        column = jnp.arange(plan.columns)[None, :]
        if not block.inside:
            mask = (row < plan.tokens) & (column < plan.head_dim)
        elif plan.head_dim < plan.columns:
            mask = jnp.broadcast_to(column < plan.head_dim, (block.rows, plan.columns))
        column += (part * plan.num_heads + self.index) * plan.head_dim
        return ref.at[self.sample, row, column], mask

    def load(self, ref, block, part=QUERY):
        """[rows, columns] of a block; zero outside the head."""
        return _load(*self._numbers(ref, part, block))

    def store(self, ref, block, values, part=QUERY):
        numbers, mask = self._numbers(ref, part, block)
        plgpu.store(numbers, values.astype(ref.dtype), mask=mask)

    def _rows(self, ref, block):
        row = block.start + jnp.arange(block.rows)
        mask = None if block.inside else row < self.plan.tokens
        return ref.at[self.sample, self.index, row], mask

    def load_rows(self, ref, block):
        """[rows] of a [batch, heads, tokens] array; zero beyond the tokens."""
        return _load(*self._rows(ref, block))

    def store_rows(self, ref, block, values):
        numbers, mask = self._rows(ref, block)
        plgpu.store(numbers, values, mask=mask)

    def where_keys(self, block, scores, otherwise):
        """[queries, keys] scores, with `otherwise` for keys beyond the tokens."""
        if block.inside:
            return scores
        is_key = (block.start + jnp.arange(block.rows) < self.plan.tokens)[None, :]
        return jnp.where(is_key, scores, otherwise)


def forward_whole(plan, dot, qkv_ref, out_ref, *lse_ref):
    scale = plan.scale * LOG2_E

    def one_head(head):
        keys = [head.load(qkv_ref, tile, KEY) for tile in plan.tiles]
        values = [head.load(qkv_ref, tile, VALUE) for tile in plan.tiles]

        def one_block(block, _):
            query = head.load(qkv_ref, block)
            scores = [
                head.where_keys(tile, dot(query, key, (1, 1)), -jnp.inf)
                for tile, key in zip(plan.tiles, keys, strict=True)
            ]
            top = functools.reduce(jnp.maximum, [x.max(axis=1) for x in scores])
            weights = [jnp.exp2((x - top[:, None]) * scale) for x in scores]
            total = sum(x.sum(axis=1) for x in weights)
            out = sum(
                dot(weight.astype(value.dtype), value)
                for weight, value in zip(weights, values, strict=True)
            )
            head.store(out_ref, block, out / total[:, None])
            for ref in lse_ref:
                head.store_rows(ref, block, top * scale + jnp.log2(total))

        _for_each_block(plan, one_block, None)

    _for_each_head(plan, one_head)


def forward_running(plan, dot, qkv_ref, out_ref, *lse_ref):
    scale = plan.scale * LOG2_E
    head, own = _own_block(plan)
    query = head.load(qkv_ref, own)

    def one_block(block, carry):
        out, top, total = carry
        key, value = (head.load(qkv_ref, block, part) for part in (KEY, VALUE))
        scores = head.where_keys(block, dot(query, key, (1, 1)), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2((scores - new_top[:, None]) * scale)
        shrink = jnp.exp2((top - new_top) * scale)
        out = out * shrink[:, None] + dot(weights.astype(value.dtype), value)
        return out, new_top, total * shrink + weights.sum(axis=1)

    out, top, total = _for_each_block_and_tail(
        plan,
        one_block,
        (
            jnp.zeros((plan.rows, plan.columns), jnp.float32),
            jnp.full((plan.rows,), -jnp.inf, jnp.float32),
            jnp.zeros((plan.rows,), jnp.float32),
        ),
    )
    head.store(out_ref, own, out / total[:, None])
    for ref in lse_ref:
        head.store_rows(ref, own, top * scale + jnp.log2(total))


def backward_whole(plan, dot, qkv_ref, lse_ref, out_bar_ref, qkv_bar_ref):
    def one_head(head):
        keys = [head.load(qkv_ref, tile, KEY) for tile in plan.tiles]
        values = [head.load(qkv_ref, tile, VALUE) for tile in plan.tiles]

        def one_block(block, bars):
            query = head.load(qkv_ref, block)
            out_bar = head.load(out_bar_ref, block)
            lse = head.load_rows(lse_ref, block)
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
            head.store(qkv_bar_ref, block, query_bar * plan.scale)
            return new_bars

        zeros = [jnp.zeros((x.rows, plan.columns), jnp.float32) for x in plan.tiles]
        bars = _for_each_block(plan, one_block, [(x, x) for x in zeros])
        for tile, (key_bar, value_bar) in zip(plan.tiles, bars, strict=True):
            head.store(qkv_bar_ref, tile, key_bar * plan.scale, KEY)
            head.store(qkv_bar_ref, tile, value_bar, VALUE)

    _for_each_head(plan, one_head)


def backward_running(plan, dot, qkv_ref, out_ref, lse_ref, out_bar_ref, qkv_bar_ref):
    head, own = _own_block(plan)

    def load_queries(block):
        query, out_bar = head.load(qkv_ref, block), head.load(out_bar_ref, block)
        out = head.load(out_ref, block).astype(jnp.float32)
        mean = (out * out_bar.astype(jnp.float32)).sum(axis=1)
        return query, out_bar, head.load_rows(lse_ref, block), mean

    def load_keys(block):
        return head.load(qkv_ref, block, KEY), head.load(qkv_ref, block, VALUE)

    def weights_and_score_bar(queries, keys, block):
        (query, out_bar, lse, mean), (key, value) = queries, keys
        weights = _weights(head, dot, query, key, lse, block)
        score_bar = weights * (dot(out_bar, value, (1, 1)) - mean[:, None])
        return weights.astype(query.dtype), score_bar.astype(query.dtype)

    def over_queries(keys, block, carry):
        key_bar, value_bar = carry
        query, out_bar, *_ = queries = load_queries(block)
        weights, score_bar = weights_and_score_bar(queries, keys, own)
        return (
            key_bar + dot(score_bar, query, (0, 0)),
            value_bar + dot(weights, out_bar, (0, 0)),
        )

    def over_keys(queries, block, query_bar):
        keys = load_keys(block)
        _, score_bar = weights_and_score_bar(queries, keys, block)
        return query_bar + dot(score_bar, keys[0])

    zeros = jnp.zeros((plan.rows, plan.columns), jnp.float32)
    over_queries = functools.partial(over_queries, load_keys(own))
    key_bar, value_bar = _for_each_block_and_tail(plan, over_queries, (zeros, zeros))
    head.store(qkv_bar_ref, own, key_bar * plan.scale, KEY)
    head.store(qkv_bar_ref, own, value_bar, VALUE)
    over_keys = functools.partial(over_keys, load_queries(own))
    query_bar = _for_each_block_and_tail(plan, over_keys, zeros)
    head.store(qkv_bar_ref, own, query_bar * plan.scale)


def _load(numbers, mask):
    return plgpu.load(numbers, mask=mask, other=None if mask is None else 0.0)


def _weights(head, dot, query, key, lse, block):
    """The softmax of a block of scores, from the log-sum-exp of its rows."""
    scores = dot(query, key, (1, 1)) * (head.plan.scale * LOG2_E)
    return head.where_keys(block, jnp.exp2(scores - lse[:, None]), 0.0)


def _own_block(plan):
    """The head and the block of a program with a running softmax."""
    start, inside = pl.program_id(0) * plan.rows, plan.tokens % plan.rows == 0
    head = _Head(plan, pl.program_id(2), pl.program_id(1))
    return head, Block(start, plan.rows, inside)


def _for_each_head(plan, one_head):
    """Calls `one_head` for each head of a program with whole rows."""
    first, sample = pl.program_id(0) * plan.heads, pl.program_id(1)

    def body(index, _):
        one_head(_Head(plan, sample, first + index))

    _loop(plan.heads, body, None)


def _for_each_block(plan, one_block, carry):
    """Loops over the blocks of queries, all of one size, in a program with whole rows.

    A smaller last block would have another layout, and then keys would be held in both
    layouts.
    """
    inside = plan.tokens % plan.rows == 0
    return _loop(
        plan.blocks,
        lambda index, x: one_block(Block(index * plan.rows, plan.rows, inside), x),
        carry,
    )


def _for_each_block_and_tail(plan, one_block, carry):
    """Loops over full blocks, which need no masks, then over a smaller last block."""
    full = plan.tokens // plan.rows
    carry = _loop(
        full,
        lambda index, x: one_block(Block(index * plan.rows, plan.rows, True), x),
        carry,
    )
    if full < plan.blocks:
        carry = one_block(Block(full * plan.rows, plan.tail, False), carry)
    return carry


def _loop(count, body, carry):
    if count == 0:
        return carry
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)
