"""Machines to compile for without having them, by their makers' published figures."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental import topologies

from xsmae.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    memory: bytes. flops: dense operations per second in `products`, the dtype in which
    the chip computes bfloat16 products. bandwidth: of memory, bytes per second. link:
    bytes per second that it sends to other devices of its host or slice, one way, over
    all links. between_hosts: the same to other hosts; 0 if `link` reaches them or if no
    rate is published. capability: a GPU's compute capability, "9.0". target: XLA's
    description of a GPU. options: for libtpu, besides the chip's name.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    between_hosts: float = 0
    products: str = "bfloat16"
    capability: str = ""
    target: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _gpu(
    memory, flops, bandwidth, link, card=0, *, name, capability, cores, fpus, threads,
    shared, reserved=1024, l2, ghz, products="bfloat16",
):  # fmt: skip
    """A GPU whose host has one network card of `card` bytes per second per GPU.

    fpus, threads (maximum), shared (bytes of shared memory) and reserved (its part for
    the system) are per core; NVIDIA calls a core a multiprocessor.
    """
    major, minor = capability.split(".")
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
          block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f}
          l2_cache_size: {l2} clock_rate_ghz: {ghz}
          device_memory_size: {memory:.0f}
          shared_memory_per_block_optin: {shared - reserved}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "NVIDIA {name}"
    """
    return Chip(memory, flops, bandwidth, link, card, products, capability, target)


_hopper = {"capability": "9.0", "cores": 132, "fpus": 128, "threads": 2048}
_hopper |= {"shared": 233472, "l2": 50 * 2**20, "ghz": 1.98}
# Cores with 100 KiB of shared memory: CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability".
_graphics = {"fpus": 128, "threads": 1536, "shared": 102400}
_ada = {"capability": "8.9", **_graphics}
# Sources: NVIDIA's data sheets of the SXM modules (one way is half of NVLink's 600 and
# 900 GB/s) and DGX systems (one card per GPU: 200 Gbit/s with the A100, 400 with the
# others); https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (half of the
# bidirectional interconnect; TPUs' gigabytes are 2^30).
# The sheets give both ways of PCI Express x16, 32 GB/s for generation 3 and 64 for
# generation 4; one way is half. NVIDIA publishes no such system with several hosts.
GPUS = {
    "a100": _gpu(
        80e9, 312e12, 2.039e12, 300e9, 25e9, name="A100", capability="8.0",
        cores=108, fpus=64, threads=2048, shared=167936, l2=40 * 2**20, ghz=1.41,
    ),
    "h100": _gpu(80e9, 989e12, 3.35e12, 450e9, 50e9, name="H100", **_hopper),
    "h200": _gpu(141e9, 989e12, 4.8e12, 450e9, 50e9, name="H200", **_hopper),
    # "NVIDIA A10 Tensor Core GPU" data sheet: 24 GB, 600 GB/s, BFLOAT16 Tensor Core
    # 125 TFLOPS dense (250 with sparsity), PCIe Gen4. Clock: its product brief.
    "a10": _gpu(
        24e9, 125e12, 600e9, 32e9, name="A10", capability="8.6", cores=72,
        l2=6 * 2**20, ghz=1.695, **_graphics,
    ),
    # "NVIDIA L4 Tensor Core GPU" data sheet: 24 GB, 300 GB/s, BFLOAT16 Tensor Core 242
    # TFLOPS with sparsity, which is 121 dense, PCIe Gen4. Clock: its product brief.
    "l4": _gpu(
        24e9, 121e12, 300e9, 32e9, name="L4", cores=58, l2=48 * 2**20, ghz=2.04,
        **_ada,
    ),
    # "NVIDIA Ada GPU Architecture" white paper, appendix A: 24 GB, 1008 GB/s, BF16
    # Tensor with FP32 accumulation 165.2 TFLOPS dense (330.4 with sparsity), PCIe Gen4.
    "rtx4090": _gpu(
        24e9, 165.2e12, 1008e9, 32e9, name="GeForce RTX 4090", cores=128,
        l2=72 * 2**20, ghz=2.52, **_ada,
    ),
    # "NVIDIA T4" data sheet: 16 GB, PCIe Gen3, and 8.1 TFLOPS in float32: it has no
    # bfloat16, and XLA computes such products in float32 there. (The 65 TFLOPS of its
    # tensor cores are of float16, which no config here computes in.) The bandwidth is
    # its product brief's; the data sheet rounds it to 300.
    "t4": _gpu(
        16e9, 8.1e12, 320e9, 16e9, name="T4", capability="7.5", cores=40, fpus=64,
        threads=1024, shared=65536, reserved=0, l2=4 * 2**20, ghz=1.59,
        products="float32",
    ),
}  # fmt: skip
TPUS = {
    # JAX sees the chip's two cores as one device, here as on the real machine.
    "v4": Chip(
        32 * 2**30, 275e12, 1228e9, 300e9, options={"chip_config_name": "megacore"}
    ),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 400e9),
}
INSTALL = "`make compiler`, or `pip install 'xsmae[compiler]'` in a new environment"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for. The chip's own links join each `a_host` of them."""

    chip: Chip
    devices: Sequence[Any]
    a_host: int

    def bandwidth(self, hosts: int, cards: int = 1) -> float:
        """Bytes per second that a device sends in a group on `hosts` hosts.

        cards: how many network cards per host a ring uses.
        """
        if hosts == 1 or not self.chip.between_hosts:
            return self.chip.link
        return min(self.chip.link, cards * self.chip.between_hosts)


def parse(name: str) -> tuple[str, str, list[int]]:
    """The parts of `KIND:CHIP:SHAPE`; raises UserError for another form."""
    kind, _, rest = name.partition(":")
    chip, _, shape = rest.partition(":")
    try:
        sizes = [int(size) for size in shape.split("x")]
    except ValueError:
        sizes = []
    chips = {"gpu": GPUS, "tpu": TPUS}.get(kind, {})
    dimensions = (1, 2) if kind == "gpu" else (3,) if chip in ("v4", "v5p") else (2,)
    if chip not in chips or len(sizes) not in dimensions or min(sizes) < 1:
        raise UserError(
            f"topology={name!r}, expected gpu:CHIP:GPUS[xHOSTS] with one of "
            f"{', '.join(GPUS)}, or tpu:CHIP:SHAPE with one of {', '.join(TPUS)}: "
            "gpu:h200:8, gpu:h200:8x4, tpu:v5e:16x16, tpu:v5p:4x4x8"
        )
    if kind == "gpu" and sizes[1:] not in ([], [1]) and not GPUS[chip].between_hosts:
        known = [other for other, gpu in GPUS.items() if gpu.between_hosts]
        raise UserError(
            f"topology={name!r} has several hosts, but NVIDIA publishes no network for "
            f"{chip}: give gpu:{chip}:{sizes[0]}, or one of {', '.join(known)}"
        )
    return kind, chip, sizes


def describe_topology(name: str) -> Topology:
    """The devices of `KIND:CHIP:SHAPE`.

    Raises UserError for an invalid name, for a shape that the maker does not build, and
    if the compiler is not installed.
    """
    kind, chip, sizes = parse(name)
    try:
        if kind == "gpu":
            a_host, hosts = (*sizes, 1)[:2]
            found = topologies.get_topology_desc(
                "", "cuda", topology=f"1x{hosts}x{a_host}",
                target_config=GPUS[chip].target,
            )  # fmt: skip
            return Topology(GPUS[chip], found.devices, a_host)
        # There is no TPU here to query or to lock.
        for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(variable, "1")
        options: dict[str, Any] = dict(TPUS[chip].options)
        if math.prod(sizes) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        shape = "x".join(map(str, sizes))
        found = topologies.get_topology_desc(f"{chip}:{shape}", "tpu", **options)
        return Topology(TPUS[chip], found.devices, len(found.devices))
    # A missing compiler and an unknown shape raise different errors of JAX and Python,
    # all of this class.
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot compile for topology={name!r} ({reason[:200]}): install the "
            f"compilers with {INSTALL}, or give another shape"
        ) from None
