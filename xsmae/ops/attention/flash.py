"""Attention as one Pallas kernel forward and one backward, on the packed projection.

Both read `[batch, tokens, 3 * heads * head_dim]` where it lies: a head of a sample is a
block of its rows and columns, and what of a block is beyond the sample or the head is
masked. Nothing of it is copied, transposed or padded in memory, and no scores are kept
there. The backward kernel computes them again from the saved log-sum-exp. Every program
writes rows of its own, without atomics: gradients are bit-equal from run to run.

The kernels themselves are in flash_kernels.py; to what length they hold whole rows of
scores, and how they are cut, in flash_plan.py.
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
except ImportError:  # JAX says that it will drop this dialect: `refusal` says so then
    kernels = None
else:
    from xsmae.ops.attention import flash_kernels as kernels

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ATTENDED = "attended"  # by it a rematerialisation knows attention's result
MAX_TOKENS = 4096
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
DTYPES = ("bfloat16", "float32")


def flash_attention(
    qkv: Float[Array, "batch tokens three_width"], *, num_heads: int
) -> Float[Array, "batch tokens width"]:
    """Softmax attention of every token to every token, as `attention` says, fused.

    Compiled for CUDA, interpreted on a CPU (slow: for tests); a program for another
    platform is refused when it is lowered. It can be differentiated once, in reverse.
    Raises ValueError where `refusal` has a reason.
    """
    reason = refusal(qkv.shape, qkv.dtype, num_heads)
    if reason is not None:
        raise ValueError(f"flash_attention: {reason}")
    return _attention(qkv, num_heads)


def refusal(shape: tuple[int, ...], dtype: jnp.dtype, num_heads: int) -> str | None:
    """Why a `qkv` of this shape and dtype cannot be served; None if it can."""
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
    # Were it not kept like the result, the kernel would run once more, backward. As it
    # does where `out` is needed below: by name it would be kept twice.
    lse = checkpoint_name(lse, ATTENDED)
    # With whole rows the backward kernel has no use for the result.
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
    """The one place that starts a kernel, and chooses Triton or the interpreter."""

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

    # On tensor cores a product keeps 10 bits of a float32; three make up for it.
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
