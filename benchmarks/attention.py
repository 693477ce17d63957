"""Memory and time of every implementation of attention on a GPU.

python -m benchmarks.attention --compile_for=h200   compiles only; needs no GPU
python -m benchmarks.attention                      on a GPU: measures time too

Prints one JSON line per case and then a Markdown table. `--suite` compiles all
combinations of lengths, widths and dtypes of tests/test_attention.py instead.
`--case="decoder"` runs only that case (repeat it for more); `--dtype=float32` replaces
bfloat16.
"""

import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from einops import rearrange
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xsmae.errors import UserError
from xsmae.ops.attention.api import attention
from xsmae.planning.topology import GPUS, describe_topology

# Sizes of official MAE networks at 128 pixels with patches of 16 (H: 14, at 224), with
# the class token. Encoders read a quarter of the patches, decoders all of them.
CASES = {  # batch, tokens, heads, head_dim
    "Ti encoder": (1024, 17, 3, 64),
    "B encoder": (1024, 17, 12, 64),
    "L encoder": (1024, 17, 16, 64),
    "H encoder": (1024, 65, 16, 80),
    "decoder": (1024, 65, 16, 32),
    "B encoder, 224 px": (1024, 50, 12, 64),
    "decoder, 224 px": (1024, 197, 16, 32),
    "B encoder, all of 224 px": (1024, 197, 12, 64),
}
SUITE = {
    f"{tokens} x {head_dim}": (2, tokens, 2, head_dim)
    for tokens, head_dim in itertools.product(
        (1, 17, 50, 65, 127, 197, 256, 1025, 4096), (16, 32, 64, 80, 128)
    )
}

# Bytes per second by JAX's device name, from NVIDIA's data sheets.
BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA L4": 3.0e11,
    "Tesla T4": 3.2e11,
}
# One compiled program runs attention on several arrays. Starting a program then takes
# little time compared with the kernels, and their input is not in the cache.
ARRAYS, CALLS, ROUNDS = 8, 5, 10


def ours(qkv, num_heads):
    return attention(qkv, num_heads=num_heads, implementation="pallas")


def xla(qkv, num_heads):
    return attention(qkv, num_heads=num_heads, implementation="xla")


def cudnn(qkv, num_heads):
    return attention(qkv, num_heads=num_heads, implementation="cudnn")


def stock(qkv, num_heads):
    """Pallas's own `mha`, with tokens padded as it requires, and masked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha
    batch, tokens, _ = qkv.shape
    size = 128 * math.ceil(tokens / 128)
    size = max(32, min(size, 1 << (tokens - 1).bit_length()))
    padded = jnp.pad(qkv, ((0, 0), (0, size - tokens), (0, 0)))
    segments = jnp.broadcast_to(jnp.arange(size) < tokens, (batch, size))
    query, key, value = rearrange(
        padded, "b n (three h d) -> three b n h d", three=3, h=num_heads
    )
    out = mha(
        query, key, value, segments.astype(jnp.int32), sm_scale=query.shape[-1] ** -0.5
    )
    return rearrange(out[:, :tokens], "b n h d -> b n (h d)")


def tokamax(qkv, num_heads):
    import tokamax

    query, key, value = rearrange(
        qkv, "b n (three h d) -> three b n h d", three=3, h=num_heads
    )
    out = tokamax.dot_product_attention(query, key, value, implementation="triton")
    return rearrange(out, "b n h d -> b n (h d)")


IMPLEMENTATIONS = (ours, xla, stock, tokamax, cudnn)


def with_gradient(attend, qkv, out_bar):
    _, pullback = jax.vjp(attend, qkv)
    return pullback(out_bar)[0]


def compile_case(implementation, case, dtype, device, *, arrays=None):
    """The compiled forward and forward-and-backward programs.

    They take one `qkv`, or a tuple of `arrays` of them.
    """
    batch, tokens, num_heads, head_dim = case
    width = num_heads * head_dim
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    qkv, out_bar = (
        jax.ShapeDtypeStruct((batch, tokens, columns), dtype, sharding=sharding)
        for columns in (3 * width, width)
    )
    attend = functools.partial(implementation, num_heads=num_heads)
    both = functools.partial(with_gradient, attend)
    given = [(qkv,), (qkv, out_bar)]
    functions = [attend, both]
    if arrays is not None:
        given = [tuple((x,) * arrays for x in one) for one in given]
        functions = [functools.partial(_of_each, one) for one in functions]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs = [
            jax.jit(function, out_shardings=sharding).lower(*one)
            for function, one in zip(functions, given, strict=True)
        ]
    return [program.compile() for program in programs]


def compiled_or_error(implementation, case, dtype, arrays, *, device):
    """The programs of `compile_case`, or the error message."""
    try:
        return compile_case(implementation, case, dtype, device, arrays=arrays)
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def _of_each(function, *arrays):
    return list(map(function, *arrays))


def moved(compiled, case) -> int:
    """Counts copies and transposes of arrays at least as large as the result."""
    batch, tokens, num_heads, head_dim = case
    least, count = batch * tokens * num_heads * head_dim, 0
    for shape in re.findall(
        r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text()
    ):
        count += math.prod(map(int, shape.split(","))) >= least
    return count


def describe(name, case, dtype, implementation, programs) -> dict:
    row = {"case": name, "shape": case, "dtype": dtype.name}
    row["implementation"] = implementation.__name__
    for part, compiled in zip(("forward", "gradient"), programs, strict=True):
        bytes_used = compiled.memory_analysis().temp_size_in_bytes
        row[f"{part}_temporary_mb"] = round(bytes_used / 1e6, 2)
        row[f"{part}_moved"] = moved(compiled, case)
    return row


def must_move(case, dtype) -> tuple[int, int]:
    """The least bytes to read and write, forward and with the gradient.

    In units of the result: 3 read and 1 written forward. With the gradient, 3 and the
    result's gradient are read again, and 3 written.
    """
    unit = math.prod(case) * dtype.itemsize
    return 4 * unit, 11 * unit


def time_case(rows, programs, case, dtype, device):
    """Adds median times to `rows`; every round runs all implementations in turn."""
    batch, tokens, num_heads, head_dim = case
    width = num_heads * head_dim
    keys = jax.random.split(jax.random.key(0), (2, ARRAYS))
    arrays = [
        tuple(jax.random.normal(key, (batch, tokens, columns), dtype) for key in some)
        for some, columns in zip(keys, (3 * width, width), strict=True)
    ]
    arrays = jax.device_put(arrays, device)
    times = {}
    for _ in range(ROUNDS + 1):
        for index, pair in enumerate(programs):
            for part, compiled in zip(("forward", "gradient"), pair, strict=True):
                given = arrays[: 1 if part == "forward" else 2]
                start = time.perf_counter()
                for _ in range(CALLS):
                    out = compiled(*given)
                jax.block_until_ready(out)
                took = (time.perf_counter() - start) / CALLS / ARRAYS
                times.setdefault((index, part), []).append(took)
    for (index, part), values in times.items():
        seconds = statistics.median(values[1:])  # the first round is a warm-up
        rows[index][f"{part}_us"] = round(seconds * 1e6, 1)
        if device.device_kind in BANDWIDTH:
            least = must_move(case, dtype)[part == "gradient"]
            least /= BANDWIDTH[device.device_kind]
            rows[index][f"{part}_of_limit"] = round(least / seconds, 3)


def environment(device, compiled_for) -> dict:
    versions = {}
    for package in (
        "jax",
        "jaxlib",
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
        "tokamax",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "run": not compiled_for,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def print_table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        cells = (
            " x ".join(map(str, v)) if k == "shape" else v
            for k, v in ((k, row.get(k, "")) for k in columns)
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def main(_):
    options = flags.FLAGS
    if options.suite and (options.case or options.dtype):
        raise SystemExit("--suite has its own cases: remove --case and --dtype")
    if options.compile_for:
        jax.config.update("jax_platforms", "cpu")
        try:
            found = describe_topology(f"gpu:{options.compile_for}:1")
        except UserError as error:
            raise SystemExit(str(error)) from None
        device = found.devices[0]
    elif jax.default_backend() == "gpu":
        device = jax.devices()[0]
    else:
        raise SystemExit("found no GPU: use one, or give --compile_for=h200")
    about = environment(device, options.compile_for)
    dtypes = (options.dtype or "bfloat16",)
    if options.suite:
        dtypes = ("bfloat16", "float32")
    cases = SUITE if options.suite else {x: CASES[x] for x in options.case or CASES}
    implementations = (ours,) if options.suite else IMPLEMENTATIONS
    table, failed = [], 0
    todo = list(itertools.product(cases.items(), map(jnp.dtype, dtypes)))
    # XLA compiles without the GIL, so compile on all cores before timing.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        build = functools.partial(compiled_or_error, device=device)
        times = (None,) if options.compile_for else (None, ARRAYS)
        futures = {
            key: pool.submit(build, *key)
            for (_, case), dtype in todo
            for key in itertools.product(implementations, (case,), (dtype,), times)
        }
        compiled = {key: future.result() for key, future in futures.items()}
    for (name, case), dtype in todo:
        rows, timed = [], []
        for implementation in implementations:
            found = [compiled[implementation, case, dtype, n] for n in times]
            errors = [x for x in found if isinstance(x, str)]
            if errors:
                failed += implementation is ours
                row = {"case": name, "dtype": dtype.name}
                row |= {"implementation": implementation.__name__, "failed": errors[0]}
                print(json.dumps({**about, **row}), flush=True)
                continue
            rows.append(describe(name, case, dtype, implementation, found[0]))
            timed.append(found[-1])
        if not options.compile_for:
            time_case(rows, timed, case, dtype, device)
        for row in rows:
            print(json.dumps({**about, **row}), flush=True)
        table.extend(rows)
    print()
    print_table(table)
    print(f"\n{json.dumps(about)}; {len(table)} compiled, {failed} of ours failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_enum("compile_for", None, list(GPUS), "Compile for this GPU; no run.")
    flags.DEFINE_bool("suite", False, "Compile all combinations of the tests' cases.")
    flags.DEFINE_multi_enum("case", None, list(CASES), "The cases; default: all.")
    flags.DEFINE_enum("dtype", None, ("bfloat16", "float32"), "The arrays' dtype.")
    app.run(main)
