"""Attention over the packed output of a query-key-value projection."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange

from xsmae.ops.attention.flash import flash_attention, refusal
from xsmae.ops.attention.xla import plain_attention

if TYPE_CHECKING:
    from jaxtyping import Array, Float


IMPLEMENTATIONS = ("auto", "pallas", "cudnn", "xla")
TIMED_TOKENS = 65  # the fused kernel was timed against the others up to this length
# Compute capabilities of GPUs that the fused kernel was compiled for: A100, H100, H200.
# Other GPUs have less shared memory, or no Triton (before 8.0).
CAPABILITIES = ("8.0", "9.0")


def attention(
    qkv: Float[Array, "batch tokens three_width"],
    *,
    num_heads: int,
    implementation: str = "xla",
) -> Float[Array, "batch tokens width"]:
    """Softmax attention of every token to every token, scaled by head_dim ** -0.5.

    `qkv` contains queries, keys and values, one after the other along its last axis,
    each with its heads one after the other (timm's layout). The softmax is computed in
    float32, whatever the dtype of `qkv`. `implementation` is one of `IMPLEMENTATIONS`:

    - `xla`: `plain_attention`, on any platform; keeps the scores in memory.
    - `pallas`: `flash_attention`, on NVIDIA GPUs; interpreted on CPUs, for tests.
    - `cudnn`: NVIDIA's implementation, only on NVIDIA GPUs with 16-bit inputs.
    - `auto`: the choice of `choose` for the platform of the compiled program. The
      platform is known when a program is lowered, not when it is traced: a GPU machine
      also runs programs on its CPU, and a CPU can compile for a remote GPU. So both
      implementations are traced, and lowering drops the other one.

    Raises ValueError if the implementation does not support the arguments.
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
    shape: tuple[int, int, int],
    dtype: jnp.dtype,
    *,
    num_heads: int,
    platform: str,
    capability: str | None = None,
) -> tuple[str, str]:
    """The implementation that `auto` uses for a `qkv` of `shape` and `dtype`, and why.

    `platform` is JAX's name: cuda, rocm, tpu, cpu. `capability` is that of a local GPU
    ("9.0"), None for a remote one. The choice follows timings on an H100
    (benchmarks/RESULTS.md): in bfloat16, at 17 to 65 tokens, the fused kernel takes
    0.28 to 0.53 of the time of the fastest other. Longer sequences were not timed
    against the others. The fused kernel was not timed in float32, so it is not chosen
    there.
    """
    if platform != "cuda":
        return "xla", f"the fused kernel is not compiled for {platform}"
    reason = refusal(shape, dtype, num_heads)
    if reason is not None:
        return "xla", f"the fused kernel does not support {reason}"
    if capability is not None and capability not in CAPABILITIES:
        return "xla", (
            f"the fused kernel was compiled for compute capability "
            f"{' and '.join(CAPABILITIES)}, not for {capability}"
        )
    if jnp.dtype(dtype) == jnp.float32:
        return "xla", "the fused kernel has not been timed in float32"
    if shape[1] > TIMED_TOKENS:
        return "pallas", "the fused kernel keeps no scores in memory"
    return "pallas", "the fused kernel was the fastest where timed, on an H100"


def _auto(qkv, *, num_heads):
    capability = None
    if jax.default_backend() == "gpu":
        capability = getattr(jax.local_devices()[0], "compute_capability", None)
    name, _ = choose(
        qkv.shape,
        qkv.dtype,
        num_heads=num_heads,
        platform="cuda",
        capability=capability,
    )
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
    # Its own checks of versions and devices raise various errors.
    if jax.default_backend() != "gpu":
        reason = f"{jax.default_backend()}, expected an NVIDIA GPU"
        raise ValueError(_cannot_serve("cudnn", reason))
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"dtype {qkv.dtype.name}, expected bfloat16 or float16"
        raise ValueError(_cannot_serve("cudnn", reason))
    try:
        return _of_cudnn(qkv, num_heads=num_heads)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(_cannot_serve("cudnn", reason)) from error


def _cannot_serve(implementation: str, reason: str) -> str:
    return (
        f"attention: implementation={implementation!r} does not support this: {reason};"
        " use auto or xla"
    )


def _of_cudnn(qkv, *, num_heads):
    batch, tokens, _ = qkv.shape
    lengths = None
    if tokens % 2:
        # JAX (0.11.2) refuses the gradient of odd lengths although cuDNN supports it,
        # and all lengths of MAE are odd. So add one token and mask it by length.
        qkv = jnp.pad(qkv, ((0, 0), (0, 1), (0, 0)))
        lengths = jnp.full(batch, tokens, jnp.int32)
    query, key, value = rearrange(
        qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads
    )
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return rearrange(out[:, :tokens], "b n h d -> b n (h d)")


_by_name = {
    "auto": _auto,
    "pallas": _pallas,
    "cudnn": _cudnn,
    "xla": plain_attention,
}
