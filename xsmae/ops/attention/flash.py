"""Attention as one Pallas kernel forward and one backward, on the packed projection.

Both read `[batch, tokens, 3 * heads * head_dim]` in place. A head of a sample is a
block of rows and columns; the part of a block outside the sample or the head is masked.
Nothing is copied, transposed or padded in memory, and no scores are stored. The
backward kernel recomputes them from the saved log-sum-exp. Every program writes its own
rows without atomics, so gradients are bit-equal from run to run.

The kernels are in flash_kernels.py. flash_plan.py chooses their block sizes, and the
length up to which they hold whole rows of scores.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from xsmae.ops.attention.by_sample import by_sample
from xsmae.ops.attention.flash_plan import Plan

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX will remove this dialect; `refusal` then reports it
    kernels = None
else:
    from xsmae.ops.attention import flash_kernels as kernels

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ATTENDED = "attended"  # the checkpoint name of attention's result
MAX_TOKENS = 4096
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
DTYPES = ("bfloat16", "float32")


def flash_attention(
    qkv: Float[Array, "batch tokens three_width"], *, num_heads: int
) -> Float[Array, "batch tokens width"]:
    """Fused softmax attention of every token to every token; see `attention`.

    It is compiled for CUDA and interpreted on a CPU (slow, for tests). Lowering for
    another platform is an error. It can be differentiated once, in reverse mode. Raises
    ValueError if `refusal` gives a reason.
    """
    reason = refusal(qkv.shape, qkv.dtype, num_heads)
    if reason is not None:
        raise ValueError(f"flash_attention: {reason}")
    return _attention(qkv, num_heads)


def refusal(shape: tuple[int, ...], dtype: jnp.dtype, num_heads: int) -> str | None:
    """Why a `qkv` of this shape and dtype is not supported; None if it is."""
    _, tokens, three_width = shape
    head_dim = three_width // (3 * num_heads)
    if kernels is None:
        return "a JAX without Pallas's Triton dialect"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"dtype {jnp.dtype(dtype).name}, expected {' or '.join(DTYPES)}"
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim}, expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if not 1 <= tokens <= MAX_TOKENS:
        return f"{tokens} tokens, expected 1 to {MAX_TOKENS}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(qkv, num_heads):
    return by_sample(functools.partial(_forward, num_heads, False))(qkv)[0]


def _attention_forward(qkv, num_heads):
    out, lse = by_sample(functools.partial(_forward, num_heads, True))(qkv)
    # Keep the log-sum-exp like the result, or the backward pass runs the kernel again.
    # If `out` is needed below, it still does: naming `out` would store it twice.
    lse = checkpoint_name(lse, ATTENDED)
    # With whole rows, the backward kernel does not need the result.
    whole = _plan(qkv, num_heads, backward=True).whole
    return out, (qkv, None if whole else out, lse)


def _attention_backward(num_heads, saved, out_bar):
    arrays = [x for x in (*saved, out_bar) if x is not None]
    return tuple(by_sample(functools.partial(_backward, num_heads))(*arrays))


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(num_heads, save, qkv):
    plan = _plan(qkv, num_heads, backward=False)
    batch, tokens, three_width = qkv.shape
    results = [jax.ShapeDtypeStruct((batch, tokens, three_width // 3), qkv.dtype)]
    if save:
        shape = (batch, num_heads, tokens)
        results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    kernel = kernels.forward_whole if plan.whole else kernels.forward_running
    return _launch(kernel, plan, [qkv], results)


def _backward(num_heads, qkv, *arrays):
    plan = _plan(qkv, num_heads, backward=True)
    kernel = kernels.backward_whole if plan.whole else kernels.backward_running
    results = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    return _launch(kernel, plan, [qkv, *arrays], results)


def _plan(qkv, num_heads, *, backward):
    batch, tokens, three_width = qkv.shape
    head_dim = three_width // (3 * num_heads)
    return Plan(batch, tokens, num_heads, head_dim, qkv.dtype.itemsize, backward)


def _launch(kernel, plan, arrays, results):
    """Starts a kernel, with Triton or the interpreter."""

    def call(precision, interpret, *arrays):
        return pl.pallas_call(
            functools.partial(kernel, plan, functools.partial(_dot, precision)),
            results,
            grid=plan.grid,
            compiler_params=plgpu.CompilerParams(
                num_warps=plan.num_warps, num_stages=plan.num_stages
            ),
            interpret=interpret,
            name=f"attention_{kernel.__name__}",
        )(*arrays)

    # A tensor-core product keeps 10 bits of a float32's mantissa; three products
    # restore the precision.
    precision = lax.Precision.DEFAULT
    if plan.itemsize == 4:
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(call, lax.Precision.HIGHEST, True),
        cuda=functools.partial(call, precision, False),
    )


def _dot(precision, a, b, contract=(1, 0)):
    """The product of two blocks over axis `contract` of each, in float32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
