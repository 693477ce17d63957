"""Planning for other machines: what is counted, and what is refused."""

import dataclasses
import json
import re
import tomllib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from xsmae.configs import common

from tests.support.devices import run_on_devices
from xsmae.cli import plan
from xsmae.errors import UserError
from xsmae.planning import step as step_of
from xsmae.planning.collectives import read_collectives
from xsmae.planning.topology import GPUS, TPUS, Topology, describe_topology, parse

LOCAL = Topology(TPUS["v5e"], jax.devices()[:1], 1)


def small_config():
    config = common.get_common("published", "tiny", "mae")
    config.batch_size = 8
    config.views.size = 16
    config.model.update(
        patch_size=4, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8,
        decoder_depth=1, decoder_num_heads=2, dtype="float32",
    )  # fmt: skip
    return config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpu:h200:1", ("gpu", "h200", [1])),
        ("gpu:a100:8x4", ("gpu", "a100", [8, 4])),
        ("tpu:v5e:16x16", ("tpu", "v5e", [16, 16])),
        ("tpu:v5p:4x4x8", ("tpu", "v5p", [4, 4, 8])),
        ("tpu:v4:2x2x1", ("tpu", "v4", [2, 2, 1])),
        ("gpu:l4:8", ("gpu", "l4", [8])),
        ("gpu:rtx4090:2x1", ("gpu", "rtx4090", [2, 1])),
    ],
)
def test_topologies(name, expected):
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "", "gpu", "gpu:h200", "gpu:h200:", "gpu:h200:0", "gpu:h200:2x2x2", "gpu:v5e:8",
        "tpu:v5e:16", "tpu:v5p:4x4", "tpu:v5e:16xx16", "cpu:h200:1", "tpu:v5e:-1x4",
    ],
)  # fmt: skip
def test_topologies_that_are_none(name):
    with pytest.raises(UserError, match=r"topology=.*expected gpu:CHIP"):
        parse(name)


@pytest.mark.parametrize("chip", ["a10", "l4", "rtx4090", "t4"])
def test_several_hosts_need_a_published_network(chip):
    with pytest.raises(UserError, match=rf"gpu:{chip}:8x4.*a100, h100, h200"):
        parse(f"gpu:{chip}:8x4")


@pytest.mark.parametrize("name", GPUS)
def test_what_xla_is_told_of_a_gpu(name):
    """The shared memory that a kernel may use is the limit of a block."""
    told = GPUS[name].target
    major, minor = GPUS[name].capability.split(".")
    assert f"major: {major} minor: {minor} " in told
    of_block = int(re.search(r"per_block_optin: (\d+)", told)[1])
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    most = {"7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227}
    assert of_block == 1024 * most[GPUS[name].capability]


@pytest.mark.parametrize("name", ["gpu:h200:8", "tpu:v5e:2x4", "tpu:v4:1x1x1"])
@pytest.mark.parametrize(
    "kind", [RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError]
)
def test_a_topology_without_its_compiler(name, kind, monkeypatch):
    def refuse(*_, **__):
        raise kind("no\nplugin")

    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    expected = rf"topology='{name}' \(no plugin"
    with pytest.raises(UserError, match=expected) as caught:
        describe_topology(name)
    for way in ("make compiler", "pip install 'xsmae[compiler]'"):
        assert way in str(caught.value)


def test_the_makefile_and_the_extra_install_the_compilers():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["compiler"]
    assert extra == ["jax[cuda12-local,tpu]", "nvidia-cuda-nvcc-cu12"]
    makefile = (root / "Makefile").read_text()
    assert "\ncompiler: $(COMPILER)/installed\n" in makefile
    assert "'.[compiler]'" in makefile


def test_a_host_has_faster_links_than_the_network():
    several = Topology(GPUS["h200"], [None] * 32, 8)
    assert several.bandwidth(1, 8) == 450e9
    assert several.bandwidth(4) == 50e9
    assert several.bandwidth(4, 2) == 100e9
    assert Topology(GPUS["h200"], [None] * 32, 16).bandwidth(2, 16) == 450e9
    assert Topology(GPUS["a100"], [None] * 32, 8).bandwidth(4) == 25e9
    assert Topology(TPUS["v5e"], [None] * 256, 256).bandwidth(1, 256) == 200e9


def test_products_are_counted_with_loops_and_gradients():
    def loss(w, x):
        return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=3)[0].sum()

    w, x = jnp.ones((5, 5)), jnp.ones((7, 5))
    product = 2 * 7 * 5 * 5
    count = step_of.multiplications
    assert count(jax.make_jaxpr(loss)(w, x).jaxpr) == 3 * product
    gradient = jax.jit(jax.grad(loss))
    assert count(jax.make_jaxpr(gradient)(w, x).jaxpr) == 9 * product
    either = jax.make_jaxpr(
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)
    )
    assert count(either(w, x).jaxpr) == product


def test_exchanges_are_read_from_the_program():
    found = run_on_devices("tests.support.collectives_on_devices", 4)
    (summed,) = [c for c in found["summed_in_a_loop"] if c["size"] > 100]
    assert (summed["kind"], summed["group"], summed["count"]) == ("all-reduce", 4, 5)
    assert summed["hosts"] == 2  # two devices per host, as in the module
    assert summed["size"] == 5 * 100 * 4
    assert summed["sent"] == pytest.approx(summed["size"] * 2 * 3 / 4)
    (gather,) = found["gathered"]
    assert (gather["kind"], gather["group"], gather["count"]) == ("all-gather", 4, 1)
    assert gather["size"] == 8 * 4 * 100 * 4
    assert gather["sent"] == gather["size"] * 3 / 4


TPU_TEXT = """
HloModule jit_step

%region_1 (p: (s32[], f32[6,4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(6)
  ROOT %lt.68 = pred[]{:T(512)} compare(%get-tuple-element.2, %constant.7), direction=LT
}

%region_2 (p: (s32[], f32[6,4])) -> (s32[], f32[6,4]) {
  %all-reduce.1 = (bf16[1,128,512]{2,1,0:T(8,128)(2,1)S(1)}, f32[128]{0:T(128)}) all-reduce(%a, %b), channel_id=26, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, use_global_device_ids=true, to_apply=%add
}

ENTRY %main (x: f32[6,4]) -> f32[6,4] {
  %while.106 = (s32[]{:T(128)}, f32[6,4]{1,0:T(8,128)}) while(%tuple.1), condition=%region_1, body=%region_2
  %all-gather.2 = f32[64,128]{1,0:T(8,128)} all-gather(%c), channel_id=3, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}, dimensions={0}
  %reduce-scatter.3 = f32[16]{0} reduce-scatter(%d), replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_exchanges_of_tpus_are_read():
    """A TPU program names mesh axes, and does not annotate loops."""
    gather, reduce, scatter = read_collectives(TPU_TEXT, 16, 16)
    size = 6 * (128 * 512 * 2 + 128 * 4)
    assert vars(reduce) == {
        "kind": "all-reduce", "group": 8, "hosts": 1, "count": 6, "size": size,
        "sent": size * 2 * 7 / 8,
    }  # fmt: skip
    assert (gather.group, gather.count, gather.size) == (2, 1, 64 * 128 * 4)
    assert (scatter.group, scatter.count, scatter.size) == (4, 1, 16 * 4 * 4)
    with pytest.raises(UserError, match="how often a loop runs"):
        read_collectives(TPU_TEXT.replace("constant(6)", "parameter(6)"), 16, 16)


@pytest.mark.parametrize(
    ("groups", "group", "hosts"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("replica_groups={}", 8, 2),
        ("replica_groups=[2,4]<=[8]", 4, 1),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, 1),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", 4, 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2, 1),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4, 1),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2, 2),
        ("channel_id=1", 8, 2),
    ],
)
def test_devices_of_a_group_and_their_hosts(groups, group, hosts):
    """8 devices, 4 per host: the size of a group, and the hosts that it is on."""
    text = f"""
ENTRY %main (x: f32[64]) -> f32[64] {{
  %all-reduce.1 = f32[64]{{0}} all-reduce(%x), {groups}, to_apply=%add
}}
"""
    (found,) = read_collectives(text, 8, 4)
    assert (found.group, found.hosts, found.cards) == (group, hosts, group // hosts)


TPU_CHAIN = """
%condition (p: (s32[])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(6)
}

%piece (p: f32[8]) -> f32[64] {
  %all-gather.2 = f32[64]{0} all-gather(%p), replica_groups=mesh['a'=8] {'a'}, frontend_attributes={chain_id="0"}
}

%body (p: (s32[])) -> (s32[]) {
  %fusion.1 = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece
  %all-gather.3 = f32[64]{0} all-gather(%p), replica_groups=mesh['a'=8] {'a'}, frontend_attributes={chain_id="1"}
}

ENTRY %main (x: f32[8]) -> f32[64] {
  %start = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece
  %while.1 = (s32[]) while(%tuple.1), condition=%condition, body=%body
  %done = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece
}
"""  # noqa: E501


def test_an_exchange_in_pieces_is_one():
    """Its pieces also occur in a loop; a whole exchange in that loop runs 6 times."""
    (found,) = read_collectives(TPU_CHAIN, 8, 8)
    assert (found.count, found.size) == (1 + 6, 7 * 64 * 4)


def test_groups_that_are_written_in_another_way_are_not_guessed():
    text = """
ENTRY %main (x: f32[64]) -> f32[64] {
  %all-reduce.1 = f32[64]{0} all-reduce(%x), replica_groups=@somewhere, to_apply=%add
}
"""
    with pytest.raises(UserError, match="which devices exchange data"):
        read_collectives(text, 8, 4)


def test_pairs_that_send_to_each_other():
    text = """
ENTRY %main (x: f32[64]) -> f32[64] {
  %collective-permute.1 = f32[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4}}
}
"""  # noqa: E501
    (found,) = read_collectives(text, 8, 4)
    assert (found.group, found.hosts, found.cards) == (2, 2, 1)
    assert found.sent == found.size == 64 * 4


def test_a_plan_is_of_the_real_step():
    config = small_config()
    found = step_of.make_plan(config, LOCAL, largest=False)
    state = step_of.trainer_for(config, LOCAL, 8)[1].state_shapes()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    # Parameters, two moments and a batch.
    assert found["memory"]["arguments"] > 3 * kept + 8 * 16 * 16 * 3
    assert found["memory"]["all"] >= sum(
        found["memory"][name] for name in ("arguments", "temporary")
    )
    assert found["collectives"] == []
    assert found["network_share"] == 0
    config.batch_size = 16
    double = step_of.make_plan(config, LOCAL, largest=False)
    assert double["flops"] == pytest.approx(2 * found["flops"], rel=0.02)
    shown = step_of.table(found)
    assert "| batch, over all | 8 |" in shown
    assert f"{found['memory']['all'] / 1e9:.2f} of 17 GB" in shown
    assert "197 TFLOPS of bfloat16" in shown


def test_a_t4_is_planned_by_its_float32():
    """A T4 has no bfloat16, so XLA computes such products in float32."""
    assert (GPUS["t4"].products, GPUS["t4"].flops) == ("float32", 8.1e12)


def test_the_largest_batch_fits_and_a_larger_does_not(monkeypatch):
    """Memory grows linearly with the batch, and faster at the end."""
    chip = TPUS["v5e"]

    def compile_step(config, topology, batch_size):
        return batch_size

    def used_memory(batch):
        return {"all": 2e9 + 1e7 * batch + (1e9 if batch > 1400 else 0)}

    monkeypatch.setattr(step_of, "compile_step", compile_step)
    monkeypatch.setattr(step_of, "used_memory", used_memory)
    found = step_of.largest_batch(small_config(), LOCAL, used_memory(8)["all"])
    assert used_memory(found)["all"] <= chip.memory
    assert 1200 < found <= 1400


NO_EXCHANGE = """
ENTRY %main (x: f32[6]) -> f32[6] {
}
"""


def memory_by_batch(monkeypatch, needed):
    """Make a step need `needed(batch)` bytes; returns the list of compiled batches."""
    compiled = []

    def compile_step(config, topology, batch_size):
        compiled.append(batch_size)
        return types.SimpleNamespace(as_text=lambda: NO_EXCHANGE, batch=batch_size)

    def used_memory(step):
        return {"arguments": 0, "temporary": 0, "all": needed(step.batch)}

    monkeypatch.setattr(step_of, "compile_step", compile_step)
    monkeypatch.setattr(step_of, "used_memory", used_memory)
    return compiled


@pytest.mark.parametrize("needed", [lambda batch: 3e9, lambda batch: 3e9 - 1e6 * batch])
def test_memory_that_does_not_grow_tells_no_largest_batch(monkeypatch, needed):
    memory_by_batch(monkeypatch, needed)
    found = step_of.make_plan(small_config(), LOCAL, largest=True)
    assert found["largest_batch"] is None
    assert "batches of 8 and 4" in found["largest_batch_unknown"]
    (row,) = [x for x in step_of.table(found).splitlines() if "largest batch" in x]
    assert found["largest_batch_unknown"] in row
    json.dumps(found)
    left_out = step_of.make_plan(small_config(), LOCAL, largest=False)
    assert "largest batch" not in step_of.table(left_out)


def test_no_batch_fits(monkeypatch):
    """The state alone does not fit: no negative batch is compiled."""
    compiled = memory_by_batch(monkeypatch, lambda batch: 99e9 + 1e9 * batch)
    assert step_of.largest_batch(small_config(), LOCAL, int(107e9)) == 0
    assert compiled == [4]


@pytest.mark.parametrize(("used", "expected"), [(3e9, 1), (99e9, None)])
def test_the_smallest_batch_where_two_of_it_do_not_fit(monkeypatch, used, expected):
    def compile_step(config, topology, batch_size):
        raise UserError(f"batch_size={batch_size} does not fit")

    monkeypatch.setattr(step_of, "compile_step", compile_step)
    config = small_config()
    config.batch_size = 1
    if expected:
        assert step_of.largest_batch(config, LOCAL, used) == expected
    else:
        with pytest.raises(UserError, match="batch_size=2 does not fit"):
            step_of.largest_batch(config, LOCAL, used)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config=configs/fmow.py"], "--topology="),
        (["--topology=gpu:h200:1"], "--config="),
        (["--config=configs/fmow.py", "--topology=gpu:h9:1"], "h9"),
        (["--config=configs/fmow.py", "--topology=gpu:h200:1", "--x=1"], "'x'"),
        (
            ["--config=configs/fmow.py", "--topology=gpu:h200:1", "--config.no=1"],
            "--config.no",
        ),
        (
            ["--config=configs/fmow.py", "--topology=here", "--config.init=nowhere"],
            "init=nowhere has no config.json",
        ),
    ],
)
def test_wrong_flags(flags, expected, capsys, monkeypatch):
    if "--topology=here" in flags:
        monkeypatch.setattr(plan, "describe_topology", lambda name: LOCAL)
    assert plan.main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_the_line_for_programs(method, monkeypatch, capsys):
    monkeypatch.setattr(plan, "describe_topology", lambda name: LOCAL)
    config = [f"--config=configs/quickstart.py:{method}", "--config.views.size=16"]
    sizes = "patch_size=4 embed_dim=16 depth=1 num_heads=2"
    if method == "mae":
        sizes += " decoder_embed_dim=8 decoder_depth=1 decoder_num_heads=2"
    config += [f"--config.model.{x}" for x in sizes.split()]
    config += ["--config.batch_size=8", "--topology=tpu:v5e:1x1", "--nolargest_batch"]
    assert plan.main(["plan", *config]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| | |"
    assert json.loads(printed[-1])["batch_size"] == 8
    assert "| encoder: width, blocks, heads | 16, 1, 2 |" in printed
    found = "| decoder: width, blocks, heads | 8, 1, 2 |" in printed
    assert found == (method == "mae")


def compiler_that_fails(monkeypatch, text):
    """Make every compilation fail with `text`."""

    def compile_nothing():
        raise jax.errors.JaxRuntimeError(text)

    lowered = types.SimpleNamespace(compile=compile_nothing)
    step = types.SimpleNamespace(lower=lambda *shapes: lowered)
    trainer = types.SimpleNamespace(
        step=step, state_shapes=lambda: None, mesh=jax.make_mesh((1,), ("data",))
    )
    monkeypatch.setattr(step_of, "trainer_for", lambda config, *more: (config, trainer))
    monkeypatch.setattr(step_of, "batch_shapes", lambda config: None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("RESOURCE_EXHAUSTED: 9 GB", UserError),
        ("INTERNAL: 9", jax.errors.JaxRuntimeError),
    ],
)
def test_a_step_without_room_is_told_by_its_batch(monkeypatch, text, error):
    compiler_that_fails(monkeypatch, text)
    with pytest.raises(error, match=text) as caught:
        step_of.compile_step(None, None, 64)
    assert ("batch_size=64 does not fit" in str(caught.value)) == (error is UserError)


# The message of jax 0.10 for the fused attention with heads of 128 on an A10.
SHARED = (
    "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 102400, "
    "available: 101376, context: []"
)


def test_a_kernel_too_large_is_no_batch_too_large(monkeypatch):
    compiler_that_fails(monkeypatch, SHARED)
    with pytest.raises(step_of.KernelError, match="requested 102400") as caught:
        step_of.compile_step(None, None, 64)
    assert "model.attention=xla" in str(caught.value)
    assert "does not fit" not in str(caught.value)
    # It does not make the largest batch 0 either.
    with pytest.raises(step_of.KernelError):
        step_of.largest_batch(small_config(), LOCAL, 10**9)


def test_attention_is_what_the_gpu_would_run():
    """In a run `auto` asks its GPU, but a plan has none."""
    for name in ("a10", "l4", "rtx4090", "t4"):
        assert step_of.attention_on("auto", GPUS[name]) == "xla"
    for chip in (GPUS["a100"], GPUS["h200"], TPUS["v5e"]):
        assert step_of.attention_on("auto", chip) == "auto"
    assert step_of.attention_on("pallas", GPUS["a10"]) == "pallas"
    with pytest.raises(step_of.KernelError, match=r"attention=pallas.*has 7\.5"):
        step_of.attention_on("pallas", GPUS["t4"])
    config = small_config()
    config.model.attention = "auto"
    local = dataclasses.replace(LOCAL, chip=GPUS["l4"])
    planned, _ = step_of.trainer_for(config, local, 8)
    assert planned.model.attention == "xla"
    assert config.model.attention == "auto"
