"""Attention over the packed output of a query-key-value projection."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange

from xsmae.ops.flash_attention import flash_attention, refusal

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "pallas", "cudnn", "xla")


def attention(
    qkv: Float[Array, "batch tokens three_width"],
    *,
    num_heads: int,
    implementation: str = "xla",
) -> Float[Array, "batch tokens width"]:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5.

    `qkv` holds queries, keys and values one after the other along its last axis, each
    with its heads one after the other (timm's layout). The softmax is computed in
    float32 whatever the dtype of `qkv`. `implementation` is one of `IMPLEMENTATIONS`:

    - `xla`: `jax.nn.dot_product_attention`, anywhere; the scores lie in memory.
    - `pallas`: `flash_attention`, on NVIDIA GPUs; on CPUs interpreted, for tests.
    - `cudnn`: NVIDIA's, on their GPUs alone, 16-bit inputs.
    - `auto`: what `choose` says for the platform that the program is compiled for.
      That is known when the program is lowered, not when it is traced: a GPU machine
      runs programs on its CPU too, and a CPU compiles them for a GPU that is elsewhere.
      So both are traced, and the one that is not for the platform is dropped then.

    Raises ValueError where the implementation cannot serve what is asked.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: implementation={implementation!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv is {qkv.shape[-1]} wide, expected a multiple of 3 * "
            f"{num_heads} heads"
        )
    call = functools.partial(_by_name[implementation], num_heads=num_heads)
    return call(qkv)


def choose(
    shape: tuple[int, int, int], dtype: jnp.dtype, *, num_heads: int, platform: str
) -> tuple[str, str]:
    """The implementation that `auto` is, and why, for a `qkv` of `shape` and `dtype`.

    `platform` is JAX's name of it: cuda, rocm, tpu, cpu. The rule rests on memory, as
    compiled for an H200 (benchmarks/RESULTS.md), not on time: none of the
    implementations has been timed on a GPU, and cuDNN's was not compiled for one.
    """
    if platform != "cuda":
        return "xla", f"the fused kernel is not compiled for {platform}"
    reason = refusal(shape, dtype, num_heads)
    if reason is not None:
        return "xla", f"the fused kernel does not serve {reason}"
    return "pallas", "the fused kernel keeps no scores in memory"


def _auto(qkv, *, num_heads):
    name, _ = choose(qkv.shape, qkv.dtype, num_heads=num_heads, platform="cuda")
    on_cuda, elsewhere = (
        functools.partial(_by_name[name], num_heads=num_heads) for name in (name, "xla")
    )
    if name == "xla":
        return elsewhere(qkv)
    return jax.lax.platform_dependent(qkv, cuda=on_cuda, default=elsewhere)


def _pallas(qkv, *, num_heads):
    reason = refusal(qkv.shape, qkv.dtype, num_heads)
    if jax.default_backend() not in ("cpu", "gpu"):
        reason = f"{jax.default_backend()}, expected an NVIDIA GPU"
    if reason is not None:
        raise ValueError(_cannot_serve("pallas", reason))
    return flash_attention(qkv, num_heads=num_heads)


def _cudnn(qkv, *, num_heads):
    # Its own checks are of versions and devices and raise what they please.
    if jax.default_backend() != "gpu":
        reason = f"{jax.default_backend()}, expected an NVIDIA GPU"
        raise ValueError(_cannot_serve("cudnn", reason))
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"dtype {qkv.dtype.name}, expected bfloat16 or float16"
        raise ValueError(_cannot_serve("cudnn", reason))
    try:
        return _of_jax(qkv, num_heads=num_heads, implementation="cudnn")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(_cannot_serve("cudnn", reason)) from error


def _cannot_serve(implementation: str, reason: str) -> str:
    return (
        f"attention: implementation={implementation!r} cannot serve this: {reason}; "
        "auto or xla can"
    )


def _of_jax(qkv, *, num_heads, implementation):
    query, key, value = rearrange(
        qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads
    )
    out = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    return rearrange(out, "b n h d -> b n (h d)")


_by_name = {
    "auto": _auto,
    "pallas": _pallas,
    "cudnn": _cudnn,
    "xla": functools.partial(_of_jax, implementation="xla"),
}
