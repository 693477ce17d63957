"""Unpickles tensors from untrusted files: few instructions, no imports."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from pathlib import PurePosixPath

import ml_dtypes
import numpy as np

from xsmae.errors import UserError

# Maximum bytes of a pickle (an encoder's has 0.1 MB), and of a tensor that repeats
# elements. At worst, reading a pickle takes about a hundred times its size.
LIMIT = 16 * 2**20
MAX_DIMS = 32  # numpy's limit before 2.0
MAX_TEXT = 500  # characters of a path; a call of five bytes can repeat a long text

AGAIN = "download or copy the file again"
WEIGHTS = "in PyTorch, torch.save(model.state_dict(), ...) and give that file"

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
        "uint64", "uint32", "uint16", "uint8", "bool"
    )
}  # fmt: skip
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool",
}  # fmt: skip
NUMPY_SCALARS = (
    "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"
)  # fmt: skip
INSTRUCTIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID"
)  # fmt: skip


class Namespace:
    """Replaces `argparse.Namespace`: attributes, readable with `vars()`."""


def require(condition: object, found: str, mend: str = AGAIN) -> None:
    if not condition:
        raise UserError(f"{found}; {mend}")


def _tensor(storage, offset, size, stride, *_, dtype=None):
    """A view of a storage, after checking that it stays inside."""
    require(
        type(storage) is np.ndarray
        and storage.ndim == 1
        and type(size) is type(stride) is tuple
        and len(size) == len(stride) <= MAX_DIMS
        and all(type(n) is int and n >= 0 for n in (offset, *size, *stride)),
        "has a tensor without a storage or a valid shape",
    )
    storage = storage.view(dtype or storage.dtype)
    if 0 in size:
        return np.empty(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    nbytes = math.prod(size) * storage.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    require(
        last < storage.size and nbytes <= max(storage.nbytes, LIMIT),
        "has a tensor that reaches beyond its storage",
    )
    start = offset * storage.itemsize
    tensor = np.ndarray(size, storage.dtype, storage, start, steps)
    tensor.flags.writeable = False
    return tensor


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _first(value, *_):
    return value


def _path(*parts):
    require(
        all(type(part) is str for part in parts) and sum(map(len, parts)) <= MAX_TEXT,
        f"has a path of more than {MAX_TEXT} characters",
        WEIGHTS,
    )
    return str(PurePosixPath(*parts))


def _device(*parts):
    return parts


def _encode(text, encoding):
    """The bytes of a numpy scalar, which pickle protocol 2 writes as text."""
    require(
        type(text) is str and len(text) <= 32 and encoding == "latin1",
        "has bytes that are not a numpy scalar",
        WEIGHTS,
    )
    return text.encode("latin1")


class _Dtype:
    """A pickled `numpy.dtype`: first its name, then (by BUILD) its byte order."""

    def __init__(self, name, align=False, copy=True):
        require(name in NUMPY_SCALARS, "has a non-numeric numpy dtype", WEIGHTS)
        self.dtype = np.dtype(name)


def _scalar(dtype, data):
    require(type(dtype) is _Dtype, "has a numpy scalar of an unknown dtype", WEIGHTS)
    return np.frombuffer(data, dtype.dtype, count=1)[0]


GLOBALS = {
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.{name}Storage": DTYPES[dtype] for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "torch.device": _device,
    "collections.OrderedDict": lambda: OrderedDict(),  # without arguments
    "argparse.Namespace": Namespace,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,  # Python 3.13
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
}


class Reader(pickle._Unpickler):
    """Python's pure-Python unpickler, with fewer instructions and without imports.

    The C unpickler is not safe here: it sets attributes of any object, uses the
    extension registry, and reserves memory for lengths that a file only claims.
    `storage(key, dtype, numel)` returns a storage and is called once per key. All
    storages together take at most `budget` bytes.
    """

    def __init__(self, file, storage=None, budget=0):
        super().__init__(file, encoding="utf-8")
        self.storage, self.budget, self.storages = storage, budget, {}

    def find_class(self, module, name):
        name = f"{module}.{name}"
        require(
            name in GLOBALS,
            f"names {ascii(name[:100])[1:-1]}, which was not run; expected tensors, "
            f"numbers, strings, lists, dictionaries and Namespace",
            WEIGHTS,
        )
        return GLOBALS[name]

    def persistent_load(self, saved):
        kind, dtype, key, _location, numel, *view = saved
        known = (kind, type(key), type(numel)) == ("storage", str, int)
        known = known and isinstance(dtype, np.dtype)
        require(known, "refers to something other than a storage", WEIGHTS)
        if key not in self.storages:
            self.budget -= numel * dtype.itemsize
            require(self.budget >= 0, "claims more bytes than it can hold")
            self.storages[key] = self.storage(key, dtype, numel)
        storage = self.storages[key]
        require(
            storage.dtype == dtype and storage.size == numel,
            f"has a storage {key[:40]!a} with two types or lengths",
        )
        if view in ([], [None]):
            return storage
        ((_key, start, length),) = view
        inside = 0 <= start <= start + length <= numel
        require(inside, f"has a view beyond its storage {key[:40]!a}")
        return storage[start : start + length]

    def refuse(self):
        require(False, "has an instruction that tensors do not need", WEIGHTS)

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        require(
            callable(function) and type(args) is tuple and len(args) <= 64,
            f"calls a {type(function).__name__}",
            WEIGHTS,
        )
        self.append(function(*args))

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace and type(state) is dict:
            target.__dict__ = state  # not copied: a file could demand endless copies
        elif type(target) is _Dtype and type(state) is tuple and state[1] in "<>|=":
            target.dtype = target.dtype.newbyteorder(state[1])
        else:  # the state of an OrderedDict has module versions: ignore it
            known = type(target) is OrderedDict
            require(known, f"sets the state of a {type(target).__name__}", WEIGHTS)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def set_items(self, items):
        target, name = self.stack[-1], type(self.stack[-1]).__name__
        known = type(target) in (dict, OrderedDict)
        require(known, f"sets items of a {name}", WEIGHTS)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples, or crafted large numbers, can take forever.
            require(
                key is None
                or type(key) in (str, bool, float)
                or (type(key) is int and abs(key) < 2**60),
                f"has a key that is not a string or number ({type(key).__name__})",
                WEIGHTS,
            )
            target[key] = value

    # All unlisted instructions are refused: EXT1, INST, OBJ, BYTEARRAY8, DUP, sets ...
    dispatch = dict.fromkeys(range(256), refuse)
    for _name in INSTRUCTIONS:
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = pickle._Unpickler.dispatch[_code]
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
