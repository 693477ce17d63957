"""Every implementation of attention compared with one reference in float32."""

import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from tests.support.devices import run_on_devices
from xsmae.models import vit
from xsmae.ops.attention.api import IMPLEMENTATIONS, attention, choose
from xsmae.ops.attention.flash_plan import Plan

ON_GPU = jax.default_backend() == "gpu"
BATCH = 2

# (tokens, heads, head_dim, dtype): all lengths, all widths, and both kinds of kernel
# with a width that is not a power of two. benchmarks/attention.py compiles all
# combinations.
CASES = [
    *((tokens, 2, 32, "bfloat16") for tokens in (1, 17, 50, 65, 127, 197, 256, 1025)),
    *((65, 2, head_dim, "bfloat16") for head_dim in (16, 64, 80)),
    (1025, 1, 80, "bfloat16"),
    (1, 2, 16, "float32"),
    (17, 6, 32, "float32"),
    (50, 1, 80, "float32"),
    (65, 2, 64, "float32"),
    (197, 1, 32, "float32"),
    (1025, 1, 16, "float32"),
]
names = functools.partial("{0[0]}x{0[1]}x{0[2]} {0[3]}".format)

# Relative to the largest number. bfloat16 has 8 bits: its last place is 0.8%.
TOLERANCE = {"float32": 5e-6, "bfloat16": 8e-3}


@pytest.fixture(autouse=True)
def all_bits_of_a_product():
    """By default a GPU keeps only 10 mantissa bits of a float32 in a product."""
    with jax.default_matmul_precision("highest"):
        yield


def reference(qkv, num_heads):
    batch, tokens, width = qkv.shape
    qkv = qkv.astype(jnp.float32).reshape(batch, tokens, 3, num_heads, -1)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) * qkv.shape[-1] ** -0.5
    out = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), value)
    return out.reshape(batch, tokens, width // 3)


def inputs(case, *leading):
    tokens, num_heads, head_dim, dtype = case
    width = num_heads * head_dim
    rng = np.random.default_rng(tokens + head_dim)
    qkv = rng.normal(scale=1.5, size=(*leading, tokens, 3 * width))
    out_bar = rng.normal(size=(*leading, tokens, width))
    return qkv.astype(jnp.dtype(dtype)), out_bar.astype(jnp.dtype(dtype))


def spoil(array, where):
    array = array.copy()
    array[where] = np.nan
    return array


def with_gradient(attend, qkv, out_bar):
    out, pullback = jax.vjp(attend, qkv)
    return out, pullback(out_bar)[0]


def compiled(function, *arrays):
    # This halves the compile time on a CPU and does not change the interpreter.
    options = {} if ON_GPU else {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arrays).compile(options)


@functools.cache
def expected_of(case):
    arrays = [x.astype(np.float32) for x in inputs(case, BATCH)]
    exact = functools.partial(
        with_gradient, functools.partial(reference, num_heads=case[1])
    )
    return compiled(exact, *arrays)(*arrays)


def assert_near(found, expected, tolerance):
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


IMPLEMENTATION = pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        "pallas",
        pytest.param("cudnn", marks=pytest.mark.skipif(not ON_GPU, reason="no GPU")),
    ],
)


@IMPLEMENTATION
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_the_reference(implementation, case):
    """Forward and gradient are correct and repeatable; samples do not mix."""
    tokens, num_heads, _, dtype = case
    if implementation == "cudnn" and dtype == "float32":
        pytest.skip("cuDNN has 16-bit kernels only")
    qkv, out_bar = inputs(case, BATCH)
    attend = functools.partial(
        attention, num_heads=num_heads, implementation=implementation
    )
    run = compiled(functools.partial(with_gradient, attend), qkv, out_bar)
    found = run(qkv, out_bar)
    for ours, theirs in zip(found, expected_of(case), strict=True):
        assert ours.dtype == dtype
        if tokens == 1 and ours.shape == qkv.shape:
            # A single token has weight 1, so queries and keys have no gradient.
            np.testing.assert_allclose(
                np.asarray(ours)[..., : 2 * width(case)], 0, atol=1e-6
            )
        assert_near(ours, theirs, TOLERANCE[dtype])

    for ours, again in zip(found, run(qkv, out_bar), strict=True):
        np.testing.assert_array_equal(ours, again)

    # Numbers beyond a block's sample belong to a neighbour. They must be masked, not
    # multiplied by zero, which would keep a NaN.
    for hidden in range(BATCH):
        spoilt = run(spoil(qkv, hidden), spoil(out_bar, hidden))
        for ours, theirs in zip(found, spoilt, strict=True):
            assert np.isnan(np.asarray(theirs[hidden], np.float32)).all()
            np.testing.assert_array_equal(ours[1 - hidden], theirs[1 - hidden])


def width(case):
    return case[1] * case[2]


@pytest.mark.parametrize(
    "case", [(17, 3, 80, "float32"), (300, 2, 80, "float32")], ids=names
)
def test_no_head_sees_its_neighbour(case):
    """Columns beyond head_dim belong to the next head, or to a key after a query."""
    num_heads, head_dim = case[1:3]
    qkv, out_bar = inputs(case, 1)
    attend = functools.partial(attention, num_heads=num_heads, implementation="pallas")
    run = compiled(functools.partial(with_gradient, attend), qkv, out_bar)
    found = run(qkv, out_bar)

    def by_head(array):
        return np.asarray(array).reshape(-1, num_heads, head_dim)

    for hidden in range(num_heads):
        spoilt = run(
            *(
                spoil(by_head(x), (slice(None), hidden)).reshape(x.shape)
                for x in (qkv, out_bar)
            )
        )
        others = np.arange(num_heads) != hidden
        for ours, theirs in zip(found, spoilt, strict=True):
            assert np.isnan(by_head(theirs)[:, hidden]).all()
            np.testing.assert_array_equal(
                by_head(ours)[:, others], by_head(theirs)[:, others]
            )


def test_scores_far_from_zero():
    """Scores of plus and minus 400; their exponential overflows float32."""
    case = (17, 1, 16, "float32")
    qkv, out_bar = inputs(case, BATCH)
    attend = functools.partial(attention, num_heads=1, implementation="pallas")
    exact = functools.partial(reference, num_heads=1)
    run, expected = (
        compiled(functools.partial(with_gradient, x), qkv, out_bar)
        for x in (attend, exact)
    )
    for sign in (1, -1):
        far = np.concatenate(
            [qkv[..., :16] / 8 + 10, qkv[..., 16:32] / 8 + sign * 10, qkv[..., 32:]],
            axis=-1,
        )
        for ours, theirs in zip(run(far, out_bar), expected(far, out_bar), strict=True):
            assert_near(ours, theirs, 1e-4)


@IMPLEMENTATION
def test_vmap_is_a_loop(implementation):
    """For the gradient too, and with an argument without a mapped axis."""
    case = (17, 2, 16, "bfloat16" if implementation == "cudnn" else "float32")
    qkv, out_bar = inputs(case, 3, BATCH)
    attend = functools.partial(
        attention, num_heads=case[1], implementation=implementation
    )
    run = functools.partial(with_gradient, attend)
    looped = [
        compiled(run, qkv[0], out_bar[0])(*x) for x in zip(qkv, out_bar, strict=True)
    ]
    mapped = compiled(jax.vmap(run), qkv, out_bar)(qkv, out_bar)
    for index, one in enumerate(looped):
        for ours, theirs in zip(mapped, one, strict=True):
            assert_near(ours[index], theirs, TOLERANCE[case[3]])
    shared = jax.vmap(run, in_axes=(None, 0))
    _, qkv_bar = compiled(shared, qkv[0], out_bar)(qkv[0], out_bar)
    assert_near(qkv_bar[0], looped[0][1], TOLERANCE[case[3]])


def test_each_device_attends_to_its_own_samples():
    """With the batch on eight devices: the same numbers and no communication."""
    found = run_on_devices("tests.support.attention_on_devices", 8)
    assert found.keys() == {"pallas", "auto"}
    for name, implementation in found.items():
        assert implementation["collectives"] == []
        assert implementation["of a device"] == [2, 2]
        # `auto` runs in bfloat16: the last place of numbers up to 2.
        assert implementation["error"] < (1e-5 if name == "pallas" else 0.01)


def lower_for_cuda(function, *arrays) -> str:
    # Since jax 0.11, a kernel is lowered for a device, which need not be present.
    device = {"device_kind": "NVIDIA H200", "num_cores": 132}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "gpu"
    mesh = AbstractMesh(
        (1,),
        ("data",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(**device),
    )
    triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with use_abstract_mesh(mesh):
        exported = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=[triton]
        )(*arrays)
    return exported.mlir_module()


@pytest.mark.parametrize(
    "case", [*CASES, (4096, 16, 128, "bfloat16"), (4096, 16, 128, "float32")], ids=names
)
def test_lowers_for_cuda(case):
    """On any machine. The program has no array of scores: they stay on chip."""
    tokens, num_heads, _, dtype = case
    qkv, out_bar = (
        jax.ShapeDtypeStruct((BATCH, tokens, columns), dtype)
        for columns in (3 * width(case), width(case))
    )
    attend = functools.partial(attention, num_heads=num_heads, implementation="pallas")
    module = lower_for_cuda(functools.partial(with_gradient, attend), qkv, out_bar)
    assert module.count("__gpu$xla.gpu.triton") == 2
    assert not re.search(r"stablehlo\.(dot_general|transpose|pad|concatenate)", module)


@pytest.mark.skipif(ON_GPU, reason="has a GPU")
def test_auto_on_a_cpu_is_xla_to_the_bit():
    qkv, out_bar = inputs((17, 2, 16, "bfloat16"), BATCH)
    found = {}
    for name in ("auto", "xla"):
        attend = functools.partial(attention, num_heads=2, implementation=name)
        run = jax.jit(functools.partial(with_gradient, attend))
        found[name] = run(qkv, out_bar)
    for ours, theirs in zip(found["auto"], found["xla"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dtype", "platform", "expected", "reason"),
    [
        ((8, 65, 1536), "bfloat16", "cuda", "pallas", "fastest where timed"),
        ((8, 4096, 1536), "bfloat16", "cuda", "pallas", "no scores in memory"),
        ((8, 65, 1536), "float32", "cuda", "xla", "not been timed in float32"),
        ((8, 4097, 1536), "bfloat16", "cuda", "xla", "4097 tokens, expected 1 to 4096"),
        ((8, 65, 1536), "float16", "cuda", "xla", "float16, expected bfloat16 or"),
        ((8, 65, 384), "bfloat16", "cuda", "xla", "head_dim 8, expected 16 to 128"),
        ((8, 65, 1536), "bfloat16", "cpu", "xla", "not compiled for cpu"),
        ((8, 65, 1536), "bfloat16", "tpu", "xla", "not compiled for tpu"),
        ((8, 65, 1536), "bfloat16", "rocm", "xla", "not compiled for rocm"),
    ],
)
def test_what_auto_chooses(shape, dtype, platform, expected, reason):
    chosen, why = choose(shape, jnp.dtype(dtype), num_heads=16, platform=platform)
    assert chosen == expected
    assert reason in why
    # The program for CUDA has a kernel or the products of XLA, as chosen.
    if platform == "cuda":
        attend = functools.partial(attention, num_heads=16, implementation="auto")
        module = lower_for_cuda(attend, jax.ShapeDtypeStruct(shape, dtype))
        assert ("__gpu$xla.gpu.triton" in module) == (expected == "pallas")
        assert ("stablehlo.dot_general" in module) == (expected == "xla")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("8.0", "pallas"), ("8.9", "xla"), ("9.0", "pallas")],
)
def test_auto_is_of_gpus_that_the_kernel_was_compiled_for(capability, expected):
    given = {"num_heads": 16, "platform": "cuda", "capability": capability}
    chosen, why = choose((8, 65, 1536), jnp.dtype("bfloat16"), **given)
    assert chosen == expected
    assert (f"not for {capability}" in why) == (expected == "xla")


@pytest.mark.parametrize("implementation", ["pallas", "auto"])
@pytest.mark.parametrize(("remat", "kernels"), [("elementwise", 2), ("full", 3)])
def test_what_a_rematerialised_block_runs(implementation, remat, kernels):
    """The backward pass repeats the forward kernel only with `remat=full`."""
    blocks = vit.stacked_blocks(
        3,
        64,
        2,
        attention_implementation=implementation,
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(blocks)

    def total(params, x):
        return vit.run_blocks(nnx.merge(graphdef, params), x, remat=remat).sum()

    x = jax.ShapeDtypeStruct((BATCH, 17, 64), jnp.bfloat16)
    module = lower_for_cuda(jax.grad(total, argnums=(0, 1)), params, x)
    assert module.count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype", "expected"),
    [
        (
            "pallas",
            (1, 17, 96),
            "float16",
            "dtype float16, expected bfloat16 or float32",
        ),
        ("pallas", (1, 17, 24), "float32", "head_dim 4, expected 16 to 128"),
        ("pallas", (1, 5000, 96), "float32", "5000 tokens, expected 1 to 4096"),
        ("magic", (1, 17, 96), "float32", "expected one of auto, pallas, cudnn, xla"),
        ("xla", (1, 17, 95), "float32", "95 wide, expected a multiple of 3 * 2 heads"),
        pytest.param(
            "cudnn",
            (1, 17, 96),
            "bfloat16",
            "cpu, expected an NVIDIA GPU; use auto or xla",
            marks=pytest.mark.skipif(ON_GPU, reason="has a GPU"),
        ),
    ],
)
def test_what_is_refused(implementation, shape, dtype, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        attention(jnp.ones(shape, dtype), num_heads=2, implementation=implementation)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("attention: ")


def test_a_jax_without_triton(monkeypatch):
    """JAX will remove this dialect; everything except the kernel must still work."""
    dialect = "jax.experimental.pallas.triton"
    for name in ("flash_kernels", "flash", "api"):
        monkeypatch.delitem(sys.modules, f"xsmae.ops.attention.{name}")
        monkeypatch.delattr(f"xsmae.ops.attention.{name}")
    monkeypatch.delattr(dialect)
    monkeypatch.setitem(sys.modules, dialect, None)
    without = importlib.import_module("xsmae.ops.attention.api")
    qkv, _ = inputs((17, 2, 16, "bfloat16"), BATCH)
    for name in ("auto", "xla"):
        np.testing.assert_array_equal(
            without.attention(qkv, num_heads=2, implementation=name),
            attention(qkv, num_heads=2, implementation="xla"),
        )
    with pytest.raises(ValueError, match="a JAX without Pallas's Triton dialect; use"):
        without.attention(qkv, num_heads=2, implementation="pallas")
    chosen, why = without.choose(qkv.shape, qkv.dtype, num_heads=2, platform="cuda")
    assert chosen == "xla"
    assert why.endswith("a JAX without Pallas's Triton dialect")


def test_tiles_pad_little():
    """For every length, tiles hold all tokens in order and pad by less than 16."""
    for tokens in range(1, 257):
        plan = Plan(1, tokens, 12, 64, 2, backward=False)
        stop = 0
        for tile in plan.tiles:
            assert tile.start == stop
            assert tile.rows.bit_count() == 1
            stop = tile.start + tile.rows
            assert tile.inside == (stop <= tokens)
        assert stop == plan.padded
        assert tokens <= stop < tokens + 16
        assert 12 % plan.heads == 0
        assert plan.rows * plan.blocks >= tokens
    assert IMPLEMENTATIONS[0] == "auto"
