"""Reading PyTorch's files without PyTorch: every format, every error.

The files are written by hand, so that PyTorch is not needed, and so that they can be
wrong in ways that PyTorch would never write.
"""

import argparse
import contextlib
import copyreg
import io
import pathlib
import pickle
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from xsmae.errors import UserError
from xsmae.weights import torch_pickle
from xsmae.weights.torch_file import read_pytorch
from xsmae.weights.torch_pickle import Namespace

CASES = Path(__file__).parent.parent.parent / "shared" / "parity"
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Name(NamedTuple):
    """A global name in the pickle; its module need not exist."""

    module: str
    name: str


class Call(NamedTuple):
    function: object
    args: object = ()
    state: object = None
    instruction: bytes = pickle.REDUCE


class Saved(NamedTuple):
    """A reference to a storage, to be pickled."""

    value: tuple


class Writer(pickle._Pickler):
    def save(self, value, save_persistent_id=True):
        if type(value) is Name and self.proto >= 4:
            self.save(value.module)
            self.save(value.name)
            self.write(pickle.STACK_GLOBAL)
        elif type(value) is Name:
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*value).encode())
        elif type(value) is Call:
            self.save(value.function)
            self.save(value.args)
            self.write(value.instruction)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, save_persistent_id)

    def persistent_id(self, value):
        return value.value if type(value) is Saved else None


def pickled(value, protocol=2):
    """The pickle of `value`; bytes are already a pickle."""
    if type(value) is bytes:
        return value
    file = io.BytesIO()
    Writer(file, protocol).dump(value)
    return file.getvalue()


def write_zip(path, value, storages=(), *, root="archive/", protocol=2, **changes):
    """`storages` and `changes` are the contents of `data/KEY` and of other entries."""
    entries = {"data.pkl": pickled(value, protocol), "byteorder": b"little"}
    entries |= {f"data/{key}": bytes_of(data) for key, data in dict(storages).items()}
    entries |= changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(root + name, data)
    return path


def write_legacy(path, value, storages=(), *, protocol=2, system=SYSTEM, keys=None):
    storages = dict(storages)
    with path.open("wb") as file:
        for header in (MAGIC, 1001, system):
            pickle.dump(header, file, protocol)
        file.write(pickled(value, protocol))
        pickle.dump(list(storages) if keys is None else keys, file, protocol)
        for data in storages.values():
            file.write(np.int64(data.size).tobytes() + bytes_of(data))
    return path


def bytes_of(data):
    return data if type(data) is bytes else data.tobytes()


def storage(data, key="0", **changes):
    """The reference to the storage of a 1-D array."""
    fields = {
        "kind": "storage",
        "type": Name("torch", STORAGES[data.dtype.name]),
        "key": key,
        "location": "cuda:0",
        "numel": data.size,
    }
    return Saved(tuple((fields | changes).values()))


def tensor(data, size=None, stride=(1,), offset=0, *, key="0", **changes):
    """The call that makes a tensor of a 1-D array; of all of it by default."""
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (
            storage(data, key, **changes),
            offset,
            (data.size,) if size is None else size,
            stride,
            False,
            OrderedDict(),
        ),
    )


def refusal(path):
    """The message of a refusal: one line that names the file and says how to fix it."""
    with pytest.raises(UserError) as caught:
        read_pytorch(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.isprintable()
    assert any(
        hint in message for hint in ("again", "torch.save(", "give a checkpoint")
    )
    return message.removeprefix(f"{path}: ")


@pytest.fixture(params=[write_zip, write_legacy], ids=["zip", "legacy"])
def write(request, tmp_path):
    """A writer of either format: (value, storages) -> path."""

    def write(*args, **kwargs):
        return request.param(tmp_path / "checkpoint.pth", *args, **kwargs)

    return write


FLOATS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_dtype(write, dtype, protocol):
    data = (np.arange(6) % 2 + np.arange(6) % 3).astype(
        getattr(ml_dtypes, dtype, dtype)
    )
    value = {"x": tensor(data, (2, 3), (3, 1))}
    found = read_pytorch(write(value, {"0": data}, protocol=protocol))["x"]
    assert found.dtype == data.dtype
    np.testing.assert_array_equal(found, data.reshape(2, 3))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "bfloat16"])
def test_dtypes_of_untyped_storages(write, dtype):
    data = np.arange(6).astype(getattr(ml_dtypes, dtype, dtype))
    untyped = Saved(
        ("storage", Name("torch.storage", "UntypedStorage"), "0", "cpu", data.nbytes)
    )
    args = (untyped, 2, (4,), (1,), False, OrderedDict(), Name("torch", dtype))
    value = Call(Name("torch._utils", "_rebuild_tensor_v3"), args)
    found = read_pytorch(write(value, {"0": data.view(np.uint8)}))
    assert found.dtype == data.dtype
    np.testing.assert_array_equal(found, data[2:])


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((4, 6), (6, 1), 0, FLOATS.reshape(4, 6)),
        ((6, 4), (1, 6), 0, FLOATS.reshape(4, 6).T),
        ((2, 2), (12, 3), 6, FLOATS.reshape(4, 6)[1::2, ::3]),
        ((2, 3, 4), (3, 1, 6), 0, FLOATS.reshape(4, 2, 3).transpose(1, 2, 0)),
        ((5, 3), (0, 1), 2, np.broadcast_to(FLOATS[2:5], (5, 3))),
        ((), (), 23, np.float32(23)),
        ((0, 3), (3, 1), 0, np.empty((0, 3))),
        ((1,), (10**15,), 23, FLOATS[23:]),
    ],
    ids=[
        "whole",
        "transposed",
        "sliced",
        "permuted",
        "expanded",
        "0-d",
        "empty",
        "one",
    ],
)
def test_strides(write, size, stride, offset, expected):
    value = tensor(FLOATS, size, stride, offset)
    found = read_pytorch(write(value, {"0": FLOATS}))
    assert found.shape == size
    np.testing.assert_array_equal(found, expected)


def test_an_empty_storage(write):
    empty = np.zeros(0, np.float32)
    assert read_pytorch(write(tensor(empty), {"0": empty})).shape == (0,)


def test_tensors_share_their_storage_and_are_read_only(write):
    value = [
        tensor(FLOATS),
        tensor(FLOATS, (6, 4), (1, 6)),
        tensor(FLOATS[:3], key="1"),
    ]
    whole, part, other = read_pytorch(write(value, {"0": FLOATS, "1": FLOATS[:3]}))
    assert np.shares_memory(whole, part)
    assert not np.shares_memory(whole, other)
    assert not any(x.flags.writeable for x in (whole, part, other))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_stands_beside_the_tensors(write, protocol):
    weight = tensor(FLOATS)
    state = OrderedDict(weight=weight)
    state._metadata = OrderedDict({"": {"version": 1}})
    plain = {
        "numbers": [1, -1, 255, 2**40, -(2**80), 2.5, True, False, None],
        "texts": ["", "é", "x" * 300, b"", b"ab"],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        3: {"step": 0.5},
        0.5: "a GSD",
    }
    if protocol == 2:
        plain["texts"].remove(b"")  # a call of `__builtin__.bytes`
    args = argparse.Namespace(
        lr=np.float64(0.5),
        step=np.int64(-3),
        flag=np.bool_(True),
        path=pathlib.PosixPath("/a/b"),
        device=Call(Name("torch", "device"), ("cuda", 1)),
        dtype=Name("torch", "bfloat16"),
        size=Call(Name("torch", "Size"), ((2, 3),)),
    )
    value = {
        "model": state,
        "plain": plain,
        "args": args,
        "parameter": Call(
            Name("torch._utils", "_rebuild_parameter"), (weight, True, OrderedDict())
        ),
        "with_state": Call(
            Name("torch._utils", "_rebuild_parameter_with_state"),
            (weight, True, OrderedDict(), {"a": 1}),
        ),
        "old": Call(
            Name("torch._utils", "_rebuild_tensor"),
            (storage(FLOATS), 0, (24,), (1,)),
        ),
        "storage": storage(FLOATS),
    }
    found = read_pytorch(write(value, {"0": FLOATS}, protocol=protocol))
    assert type(found["model"]) is OrderedDict
    for x in (found["model"]["weight"], *list(found.values())[3:]):
        np.testing.assert_array_equal(x, FLOATS)
    assert found["plain"] == plain
    assert type(found["args"]) is Namespace
    assert found["args"].path == "/a/b"
    assert vars(found["args"]) == {
        "lr": 0.5,
        "step": -3,
        "flag": True,
        "path": "/a/b",
        "device": ("cuda", 1),
        "dtype": np.dtype(ml_dtypes.bfloat16),
        "size": (2, 3),
    }
    assert type(found["args"].step) is np.int64


def test_names_of_other_versions(write):
    """numpy 1 and Python 3.13 use other module names."""
    scalar = Name("numpy.core.multiarray", "scalar")
    little, big = (
        Call(Name("numpy", "dtype"), ("f4", False, True), (3, order, *[None] * 3))
        for order in "<>"
    )
    encode = Name("_codecs", "encode")
    value = [
        Call(scalar, (little, Call(encode, ("\0\0\0\x40", "latin1")))),
        Call(scalar, (big, Call(encode, ("\x40\0\0\0", "latin1")))),
        Call(Name("pathlib._local", "PosixPath"), ("a", "b")),
    ]
    assert read_pytorch(write(value)) == [2.0, 2.0, "a/b"]


@pytest.mark.parametrize("root", ["", "archive/", "a b é.x/"])
def test_any_root_of_the_zip(tmp_path, root):
    path = write_zip(tmp_path / "x", tensor(FLOATS), {"0": FLOATS}, root=root)
    np.testing.assert_array_equal(read_pytorch(path), FLOATS)


def test_a_deflated_zip_without_byteorder(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled(tensor(FLOATS)))
        archive.writestr("x/data/0", FLOATS.tobytes())
    np.testing.assert_array_equal(read_pytorch(tmp_path / "x"), FLOATS)


def test_views_of_a_legacy_storage(tmp_path):
    value = [
        tensor(FLOATS, (4,), view=("5", 20, 4)),
        tensor(FLOATS, view=None),
        tensor(FLOATS, (2,), (1,), 1, view=("6", 0, 3)),
    ]
    path = write_legacy(tmp_path / "x", value, {"0": FLOATS})
    part, whole, first = read_pytorch(path)
    np.testing.assert_array_equal(part, FLOATS[20:])
    np.testing.assert_array_equal(whole, FLOATS)
    np.testing.assert_array_equal(first, FLOATS[1:3])


@pytest.mark.parametrize("view", [("5", 22, 4), ("5", -1, 2), ("5", 4, -2)])
def test_views_beyond_a_legacy_storage(tmp_path, view):
    value = tensor(FLOATS, (1,), view=view)
    path = write_legacy(tmp_path / "x", value, {"0": FLOATS})
    assert "view beyond its storage '0'" in refusal(path)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no official cases in {CASES}")
@pytest.mark.parametrize(
    "name",
    ["mae", "scale_mae", "satmae_group_channels"]
    + [f"cross_scale_mae_{x}" for x in ("raw_pix", "norm_pix", "xformers")],
)
def test_official_cases(name):
    found = read_pytorch(CASES / f"{name}.pth")
    assert len(found["model"]) > 50
    for tensor in found["model"].values():
        assert type(tensor) is np.ndarray
        assert np.isfinite(tensor).all()
    with zipfile.ZipFile(CASES / f"{name}.pth") as archive:
        numels = [x.file_size for x in archive.infolist() if "/data/" in x.filename]
    assert sum(x.nbytes for x in found["model"].values()) == sum(numels)


@pytest.mark.parametrize("name", ["encoder.safetensors", "encoder.bin"])
def test_safetensors(tmp_path, name):
    tensors = {
        "f32": FLOATS.reshape(4, 6),
        "f16": FLOATS.astype(np.float16),
        "bf16": FLOATS.astype(ml_dtypes.bfloat16),
        "int": np.array(3),
        "empty": np.zeros((0, 3), bool),
    }
    save_file(tensors, tmp_path / name)
    found = read_pytorch(tmp_path / name)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    assert "cut short" in refusal(tmp_path / name)


# Files that are not checkpoints


def zip_of(**entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/"), data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<!DOCTYPE html>\n<html>sign in</html>", "text that begins with b'<!DOCTYPE"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "begins with b'version ht",
        ),
        (b"\xff\xfe\x00\x01" * 20, r"begins with b'\xff\xfe\x00"),
        (pickle.dumps({"a": 1}), r"begins with b'\x80\x04"),
        (zip_of(a=b"1", b=b"2"), "is a zip ('a', 'b', ...) without one data.pkl"),
        (zip_of(a__data__pkl=b""), "without one data.pkl"),
        (zip_of(**{"a__data.pkl": b"", "b__data.pkl": b""}), "without one data.pkl"),
        (zip_of(**{"a__data.pkl": b"N."})[:-30], "cut short"),
        (
            zip_of(**{"a__data.pkl": b"", "a__constants.pkl": b""}),
            "TorchScript archive",
        ),
        (zip_of(**{"a__data.pkl": b"", "a__code__m.py": b""}), "TorchScript archive"),
        (zip_of(**{"data.pkl": b"N.", "byteorder": b"big"}), "big-endian"),
        (zip_of(**{"data.pkl": b"N.", "byteorder": b"x" * 99}), "expected at most 9"),
    ],
    # A zip contains the time, but workers must agree on the test names.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_checkpoint(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    assert message in refusal(tmp_path / "x.pth")


def test_no_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "x.pth")
    assert "not a file" in refusal(tmp_path)


def test_wrong_entries_of_the_zip(tmp_path):
    path, value = tmp_path / "x", tensor(FLOATS)
    assert "lacks 'data/0'" in refusal(write_zip(path, value))
    short = write_zip(path, value, {"0": FLOATS[:-1]})
    assert "ends within storage '0'" in refusal(short)
    long = write_zip(path, value, {"0": np.tile(FLOATS, 2)})
    assert "has 192 bytes in 'data/0'" in refusal(long)
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("archive/data/0", FLOATS.tobytes())
    assert "two entries" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x/data.pkl", pickled(1))
    assert "expected at most" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": SYSTEM | {"little_endian": False}}, "big-endian"),
        ({"system": [1]}, "cannot be read"),
        ({"keys": []}, "lists storages"),
        ({"keys": ["0", "0"]}, "lists storages"),
        ({"keys": ["1"]}, "lists storages"),
        ({"keys": None, "storages": {"0": FLOATS[:-1]}}, "storage '0'"),
    ],
)
def test_wrong_parts_of_a_legacy_file(tmp_path, changes, message):
    path = tmp_path / "x"
    write_legacy(path, tensor(FLOATS), **{"storages": {"0": FLOATS}, **changes})
    assert message in refusal(path)


def test_a_wrong_length_before_a_legacy_storage(tmp_path):
    path = write_legacy(tmp_path / "x", tensor(FLOATS), {"0": FLOATS})
    content = path.read_bytes()
    end = len(content) - FLOATS.nbytes
    path.write_bytes(content[: end - 8] + np.int64(23).tobytes() + content[end:])
    assert "storage '0'" in refusal(path)


@pytest.mark.parametrize("tenth", range(1, 10))
def test_cut_short(write, tenth):
    value = {"x": tensor(FLOATS), "args": argparse.Namespace(a=1)}
    path = write(value, {"0": FLOATS})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenth // 10])
    refusal(path)


def test_cut_short_at_every_byte_of_the_pickle(tmp_path):
    data = pickled({"x": tensor(FLOATS), "args": argparse.Namespace(a=1)}, 4)
    for length in range(len(data)):
        refusal(write_zip(tmp_path / "x", data[:length], {"0": FLOATS}))


# Hostile files

MARKER = "ran"
HOSTILE = [
    (Name("os", "system"), (f"touch {MARKER}",)),
    (Name("posix", "system"), (f"touch {MARKER}",)),
    (Name("subprocess", "check_call"), (["touch", MARKER],)),
    (Name("builtins", "eval"), (f"open({MARKER!r}, 'w')",)),
    (Name("__builtin__", "exec"), (f"open({MARKER!r}, 'w')",)),
    (Name("builtins", "open"), (MARKER, "w")),
    (Name("pathlib", "Path.touch"), (pathlib.PosixPath(MARKER),)),
    (Name("builtins", "getattr"), (Name("os", "path"), "join")),
    (Call(Name("builtins", "getattr"), (Name("os", "sys"), "exit")), ()),
    (Name("pickle", "loads"), (b"N.",)),
    (Name("numpy", "load"), (MARKER,)),
    (Name("numpy.core.multiarray", "_reconstruct"), ()),
    (Name("functools", "partial"), (print,)),
    (Name("torch.hub", "load"), ("a/b", "c")),
    (Name("torch.storage", "_load_from_bytes"), (b"",)),
    (Name("torch._utils", "_rebuild_tensor_v2.__globals__"), ()),
    (Name("collections", "OrderedDict.__init__.__globals__"), ()),
    (Name("argparse", "Namespace.__class__"), ()),
    (Name("xsmae.weights.torch_pickle", "GLOBALS"), ()),
    (Name("torch", "load"), (MARKER,)),
    (Name("torch", "Tensor"), ()),
]


def first_name(function, args):
    """The first hostile name is refused."""
    return function if type(function) is Name else function.function


@pytest.mark.parametrize(
    ("function", "args"), HOSTILE, ids=[".".join(first_name(*x)) for x in HOSTILE]
)
@pytest.mark.parametrize("protocol", [2, 4], ids=["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize("place", ["bare", "value", "argument", "state", "header"])
def test_nothing_runs(tmp_path, monkeypatch, function, args, protocol, place):
    monkeypatch.chdir(tmp_path)
    call = Call(function, args)
    value = {
        "bare": call,
        "value": {"model": OrderedDict(a=[tensor(FLOATS), (1, call)])},
        "argument": Call(Name("torch", "Size"), ((1, call),)),
        "state": argparse.Namespace(a=call),
        "header": None,
    }[place]
    name = ".".join(first_name(function, args))
    if place == "header":
        path = write_legacy(tmp_path / "x", value, protocol=protocol)
        magic = pickle.dumps(MAGIC, protocol)
        path.write_bytes(magic + pickled(call, protocol))
        assert f"names {name}, which was not run" in refusal(path)
    else:
        for write in (write_zip, write_legacy):
            path = write(tmp_path / "x", value, {"0": FLOATS}, protocol=protocol)
            assert f"names {name}, which was not run" in refusal(path)
    assert not Path(MARKER).exists()


def test_the_marker_shows_what_runs(tmp_path, monkeypatch):
    """The test above can fail, because Python's own unpickler runs the code."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(Call(*HOSTILE[0])))
    assert Path(MARKER).exists()


def test_the_name_of_a_global_is_shown_safely(write):
    message = refusal(write(Name("a\x1b[2J\u2028", "b" * 10**6), protocol=4))
    assert r"names a\x1b[2J\u2028.bbb" in message
    assert len(message) < 500


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    "target",
    [
        REBUILD,
        Name("argparse", "Namespace"),
        Name("torch", "float32"),
        Name("torch", "FloatStorage"),
        Name("numpy", "dtype"),
        tensor(FLOATS),
        storage(FLOATS),
        [],
        {},
        (1,),
        "x",
        1.5,
        None,
    ],
)
@pytest.mark.parametrize("state", [{"__code__": 1}, (None, {"__doc__": "x"}), (3, ">")])
def test_state_of_nothing_but_a_namespace(write, target, state):
    before = dict(vars(torch_pickle._tensor)), torch_pickle._tensor.__doc__
    data = pickled(target)[:-1] + pickled(state)[2:-1] + pickle.BUILD + pickle.STOP
    assert "sets the state of a" in refusal(write(data, {"0": FLOATS}))
    assert (dict(vars(torch_pickle._tensor)), torch_pickle._tensor.__doc__) == before
    assert vars(Namespace).get("__code__") is None


def test_attributes_of_a_namespace_change_nothing_else(write):
    state = {"__class__": 1, "__setstate__": REBUILD, "extend": REBUILD, "a": 2}
    value = Call(Name("argparse", "Namespace"), (), state, pickle.NEWOBJ)
    found = read_pytorch(write(value))
    assert type(found) is Namespace
    assert vars(found)["a"] == 2
    assert vars(Namespace()) == {}
    assert not hasattr(Namespace, "a")


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x01.",  # EXT1
        b"\x83\x01\x00.",
        b"\x84\x01\x00\x00\x00.",
        b"(ios\nsystem\n.",  # INST
        b"(cargparse\nNamespace\no.",  # OBJ
        b"cargparse\nNamespace\n)}\x92.",  # NEWOBJ_EX
        b"\x96\xff\xff\xff\xff\xff\xff\x00\x00.",  # BYTEARRAY8
        b"\x97.",  # NEXT_BUFFER
        b"\x8f(K\x01\x90.",  # a set
        b"(K\x01\x91.",  # a frozenset
        b"(K\x01K\x02d.",  # DICT
        b"(K\x01l.",  # LIST
        b"P0\n.",  # PERSID
        b"]2.",  # DUP
        b"S'a'\n.",  # STRING
        b"\xff.",
    ],
)
def test_other_instructions(write, data, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 1, print)
    assert "has an instruction" in refusal(write(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (25,)},
        {"size": (4, 7), "stride": (6, 1)},
        {"size": (4, 6), "stride": (7, 1)},
        {"size": (1,), "offset": 24},
        {"size": (1,), "offset": -1},
        {"size": (2,), "stride": (-1,), "offset": 4},
        {"size": (-1,)},
        {"size": (2,), "stride": (2**62,)},
        {"size": (5,), "stride": (2**62,)},  # wraps to zero in 64 bits
        {"size": (2**63, 2**63), "stride": (0, 0)},
        {"size": (10**9,), "stride": (0,)},
        {"size": (2**62, 0, 2**62), "stride": (1, 1, 1)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": [24]},
        {"size": 24},
        {"size": (24.0,)},
        {"size": (True,)},
        {"size": "a"},
        {"size": (1,), "stride": None},
        {"size": (1,), "offset": None},
        {"kind": "module"},
        {"type": Name("torch", "device")},
        {"key": 0},
        {"key": None},
        {"key": "../0"},
        {"numel": -24},
        {"numel": 24.0},
        {"numel": 23},
        {"numel": 2**40},
        {"numel": 10**30},
        {"numel": None},
        {"view": ("1", 0)},
        {"view": 3},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(write, changes):
    path = write(tensor(FLOATS, **changes), {"0": FLOATS})
    tracemalloc.start()
    refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((25,), (1,), 0), ((5,), (2**62,), 0), ((1,), (1,), 24), ((10**9,), (0,), 0)],
)
def test_the_bounds_are_known_before_the_view(write, size, stride, offset):
    path = write(tensor(FLOATS, size, stride, offset), {"0": FLOATS})
    assert "has a tensor that reaches beyond its storage" in refusal(path)


@pytest.mark.parametrize(
    "value",
    [
        Call(REBUILD, (FLOATS.tolist(), 0, (1,), (1,))),
        Call(REBUILD, (tensor(FLOATS, (4, 6), (6, 1)), 0, (1,), (1,))),
        Call(REBUILD, ()),
        Call(REBUILD, [storage(FLOATS), 0, (1,), (1,)]),
        Call(REBUILD, (None,) * 100),
        Call(tensor(FLOATS)),
        Call("os.system", ("touch ran",)),
        Call(Name("collections", "OrderedDict"), ([["a", 1]],)),
        Call(Name("argparse", "Namespace"), (1,), None, pickle.NEWOBJ),
        Call(Name("argparse", "Namespace"), (), [1]),
        Call(Name("torch", "Size")),
        Call(Name("numpy", "dtype"), ("O", False, True)),
        Call(Name("numpy", "dtype"), ("V99999999",)),
        Call(Name("numpy", "dtype"), ([("a", "f4")],)),
        Call(Name("numpy", "dtype"), ("f4",), (3, "x")),
        Call(Name("numpy._core.multiarray", "scalar"), (Name("torch", "float32"), "a")),
        Call(
            Name("numpy._core.multiarray", "scalar"),
            (Call(Name("numpy", "dtype"), ("f4",)), b"123"),
        ),
        Call(
            Name("numpy._core.multiarray", "scalar"),
            (Call(Name("argparse", "Namespace"), (), {"dtype": "f4"}), b"1234"),
        ),
        Call(Name("pathlib", "PosixPath"), ("a",) * 65),
        Call(Name("_codecs", "encode"), ("a", "rot13")),
        Call(Name("_codecs", "encode"), ("a" * 33, "latin1")),
        Call(Name("_codecs", "encode"), ("é€", "latin1")),
        Call(Name("pathlib", "PosixPath"), ("a" * 501,)),
        Call(Name("pathlib", "PosixPath"), (3,)),
        [tensor(FLOATS), tensor(FLOATS.view(np.int32))],
        [tensor(FLOATS), tensor(FLOATS[:3])],
        {(1, 2): 3},
        {2**60: 3},
        {b"a": 3},
        Saved("storage"),
        Saved(()),
        b"K\x01K\x01K\x01s.",
        b"]K\x01K\x01s.",
        b"}(K\x01u.",
        b"}K\x01a.",
        b"h\x05.",
        b"R.",
        b"0.",
        b".",
        b"\x80\x09N.",
        b"K\x01",
        b"X\xff\xff\xff\x7f.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"X\x02\x00\x00\x00\xff\xff.",
    ],
    ids=lambda x: repr(x)[:80],
)
def test_calls_with_wrong_arguments(write, value):
    refusal(write(value, {"0": FLOATS}))


@pytest.mark.parametrize(
    "data", [b"Nr\xff\xff\xff\x7f.", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN."]
)
def test_claims_take_no_memory(tmp_path, data):
    """A high memo index and a long frame, for which the C unpickler reserves memory."""
    path = write_zip(tmp_path / "x", data)
    tracemalloc.start()
    assert read_pytorch(path) is None
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_a_storage_is_in_memory_once(write):
    data = np.zeros(2**21, np.float32)
    path = write([tensor(data), tensor(data, (2**20, 2), (1, 2**20))], {"0": data})
    tracemalloc.start()
    found = read_pytorch(path)
    assert tracemalloc.get_traced_memory()[1] < 1.2 * data.nbytes
    tracemalloc.stop()
    assert len(found) == 2


def test_nested_and_shared_without_end(write):
    assert read_pytorch(write(b"]" * 10**5 + b"a" * (10**5 - 1) + b".")) is not None
    assert read_pytorch(write(b")" + b"\x85" * 10**5 + b".")) is not None
    twice_the_one_before = b")" + b"q\x00h\x00\x86" * 100 + b"."
    assert len(read_pytorch(write(twice_the_one_before))) == 2
    own = read_pytorch(write(b"]q\x00h\x00a."))
    assert own[0] is own


@pytest.mark.parametrize("tuples", [b"\x85" * 10**5, b"q\x00h\x00\x86" * 100])
def test_the_hash_of_nested_tuples_is_never_asked_for(write, tuples):
    """Hashing would overflow the stack or take forever."""
    assert "has a key" in refusal(write(b"})" + tuples + b"K\x01s."))


def test_bombs(tmp_path):
    path = tmp_path / "x"

    def write(data, size, claimed):
        """A deflated storage of `size` zeros; the zip's directory claims `claimed`."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", pickled(data))
            archive.writestr("x/data/0", bytes(size))
        sizes = size.to_bytes(4, "little"), claimed.to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(*sizes))

    write(tensor(FLOATS, (1,), numel=2**28), 2**24, 2**30)
    assert "claims more bytes" in refusal(path)
    write(tensor(FLOATS), 2**24, FLOATS.nbytes)
    tracemalloc.start()
    refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    write_zip(path, bytes(torch_pickle.LIMIT + 1))
    assert f"expected at most {torch_pickle.LIMIT}" in refusal(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder, and by format (content, how to write a changed one)."""
    folder = tmp_path_factory.mktemp("corrupt")
    value = {
        "model": OrderedDict(a=tensor(FLOATS, (6, 4), (1, 6)), b=tensor(FLOATS)),
        "args": argparse.Namespace(lr=np.float32(1), path=pathlib.PosixPath("/a")),
        "size": Call(Name("torch", "Size"), ((2, 3),)),
        "numbers": [1, 2.5, 2**70, "é", None, True],
    }
    storages, path = {"0": FLOATS}, folder / "x.pth"
    contents = {
        "zip": write_zip(path, value, storages).read_bytes(),
        "legacy": write_legacy(path, value, storages).read_bytes(),
        "pickle": pickled(value, 2),
        "pickle of protocol 4": pickled(value, 4),
    }
    return path, contents


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_gives_a_value_or_a_refusal(sound, data):
    path, contents = sound
    kind = data.draw(st.sampled_from(sorted(contents)))
    content = bytearray(contents[kind])
    # A pickle outside a zip has no checksum that would catch the damage first.
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if kind.startswith("pickle"):
        write_zip(path, bytes(content), {"0": FLOATS})
    else:
        path.write_bytes(content)
    started = time.perf_counter()
    with contextlib.suppress(UserError):
        read_pytorch(path)
    assert time.perf_counter() - started < 5


def test_torch_is_not_needed(write):
    read_pytorch(write(tensor(FLOATS), {"0": FLOATS}))
    assert "torch" not in sys.modules
