"""A pickle machine that cannot run anything.

Python's own unpickler imports what a pickle names and calls it. This one never imports and never
calls: a name becomes a `Name`, a record of text, and the operations that would call it look it up
in the closed tables below, which build inert data of our own. Whatever the tables lack is refused by
name. `pickletools.genops` decodes the operations; the machine knows those that torch.save writes.
No operation makes or copies more than what the pickle spells out, so its size bounds the memory.
"""

import io
import pickletools
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tools.errors import ToolError

MAX_INT_BITS = 1024  # longer ones cost quadratic time to print


class UnsafePickle(ToolError):
    """A pickle names or does something that no checkpoint of ours needs."""


@dataclass(frozen=True)
class Name:
    """What a pickle calls `module.name`. Nothing is imported for it."""

    path: str


@dataclass(eq=False)
class Opaque:
    """An object whose content is of no use to us: a path, a device, a NumPy scalar."""

    path: str


@dataclass(eq=False)
class Module:
    """A pickled network layer: the class it was of, and its attributes."""

    path: str
    state: dict[Any, Any] = field(default_factory=dict, repr=False)


def _mapping(path: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    (mapping,) = arguments or ({},)
    if not isinstance(mapping, dict):
        raise TypeError(f"a {path} made of a {type(mapping).__name__}")
    return mapping


def _set(path: str, arguments: tuple[Any, ...]) -> set[Any]:
    (items,) = arguments or ([],)
    made = {_key(item) for item in items}
    items.clear()  # written for this set alone; used again and again, it would let a small pickle fill the memory
    return made


def _opaque(path: str, arguments: tuple[Any, ...]) -> Opaque:
    return Opaque(path)


def _module(path: str, arguments: tuple[Any, ...]) -> Module:
    return Module(path)


# Layers of YOLOv5 releases 6 and 7, with the activations that its configuration files offer.
MODULES = (
    *(f"models.yolo.{name}" for name in ("Model", "DetectionModel", "Detect")),
    *(f"models.common.{name}" for name in ("Bottleneck", "C3", "Concat", "Conv", "DWConv", "SPP", "SPPF")),
    *(f"torch.nn.modules.activation.{name}" for name in ("Hardswish", "LeakyReLU", "Mish", "ReLU", "Sigmoid", "SiLU")),
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
# Beside the weights lie options, paths and scores of the training; their values are dropped.
OPAQUE = (
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "_codecs.encode",
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.device",
)
MAPPINGS = (
    "collections.Counter",
    "collections.OrderedDict",
    *(
        f"{lightning}.utilities.parsing.AttributeDict"
        for lightning in ("lightning.fabric", "lightning_fabric", "pytorch_lightning", "lightning.pytorch")
    ),
)
SETS = ("__builtin__.set", "builtins.set")
# Names that stand for themselves.
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
VALUES = (
    *STORAGES,
    *(f"torch.{dtype}" for dtype in ("float64", "float32", "float16", "bfloat16", "bool", "uint8")),
    *(f"torch.int{bits}" for bits in (8, 16, 32, 64)),
    # Before release 1.5, Lightning kept the state of a callback under its class.
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)

Build = Callable[[str, tuple[Any, ...]], Any]  # takes the name and the arguments that the pickle would call it with
BUILDERS: dict[str, Build] = {
    **dict.fromkeys(MODULES, _module),
    **dict.fromkeys(OPAQUE, _opaque),
    **dict.fromkeys(MAPPINGS, _mapping),
    **dict.fromkeys(SETS, _set),
}

# Names outside the tables that people do meet, and what they can do about it.
ADVICE = {
    "models.common.Focus": "it is of YOLOv5 release 5 or older; use weights of release 6 or 7",
    "models.": "it is not a detector of YOLOv5 release 6 or 7; use one of its sizes n s m l x n6 s6 m6 l6 x6",
    "ultralytics.": "it is of the ultralytics package (YOLOv8 or later); use weights of YOLOv5 release 6 or 7",
}
DEFAULT_ADVICE = (
    "nothing of it was run; if you trust the file, load it in the program that wrote it and save model.state_dict()"
)


def unpickle(data: bytes, builders: Mapping[str, Build], load_persistent: Callable[[Any], Any]) -> Any:
    """The content of a pickle, made of dict, list, tuple, set, text, numbers, `Name`, `Opaque`, `Module`, and what
    `builders` (added to the tables here) and `load_persistent` return.

    Raises UnsafePickle for a name or an operation outside the tables, ToolError for a damaged pickle.
    """
    try:
        return _Machine({**BUILDERS, **builders}, load_persistent).run(data)
    except (ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ToolError(
            f"its pickle is damaged ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def _key(value: Any) -> Any:
    """`value`, if it may be a key: hashing deeply nested tuples would exhaust the C stack."""
    scalar = (str, int, float, bytes, type(None), Name, Opaque)
    if isinstance(value, scalar) or (isinstance(value, tuple) and all(isinstance(item, scalar) for item in value)):
        return value
    raise TypeError(f"a {type(value).__name__} as a key")


class _Machine:
    """The stack machine of the pickle format; `pickletools` describes each operation."""

    PUSHES = (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
    CONSTANTS: ClassVar = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
    EMPTY: ClassVar = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}

    def __init__(self, builders: Mapping[str, Build], load_persistent: Callable[[Any], Any]):
        self.builders = builders
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            name = opcode.name
            if name in self.PUSHES:
                if isinstance(argument, int) and argument.bit_length() > MAX_INT_BITS:
                    raise ValueError(f"a number of {argument.bit_length()} bits")
                self.stack.append(argument)
            elif name in self.CONSTANTS:
                self.stack.append(self.CONSTANTS[name])
            elif name in self.EMPTY:
                self.stack.append(self.EMPTY[name]())
            elif name == "STOP":
                break
            else:
                operation = getattr(self, f"op_{name.lower()}", None)
                if operation is None:
                    raise UnsafePickle(f"its pickle uses the operation {name}, which torch.save never writes")
                operation(argument)
        return self.stack.pop()

    def op_proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"pickle protocol {version}")

    def op_frame(self, size: int) -> None:
        """A hint for buffered reading."""

    # Memo

    def op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def op_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    op_put = op_long_binput = op_binput
    op_get = op_long_binget = op_binget

    # Containers

    def op_mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def op_pop_mark(self, _: None) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def op_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.op_pop_mark(None)

    def op_tuple(self, _: None) -> None:
        items = tuple(self.op_pop_mark(None))
        self.stack.append(items)

    def op_list(self, _: None) -> None:
        items = self.op_pop_mark(None)
        self.stack.append(items)

    def op_dict(self, _: None) -> None:
        items = self.op_pop_mark(None)
        self.stack.append({})
        self._set_items(items)

    def op_frozenset(self, _: None) -> None:
        items = frozenset(_key(item) for item in self.op_pop_mark(None))
        self.stack.append(items)

    def _tuple_of(self, count: int) -> None:
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def op_tuple1(self, _: None) -> None:
        self._tuple_of(1)

    def op_tuple2(self, _: None) -> None:
        self._tuple_of(2)

    def op_tuple3(self, _: None) -> None:
        self._tuple_of(3)

    def op_append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def op_appends(self, _: None) -> None:
        self._extend(self.op_pop_mark(None))

    def op_additems(self, _: None) -> None:
        items = self.op_pop_mark(None)
        self._top(set).update(_key(item) for item in items)

    def op_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def op_setitems(self, _: None) -> None:
        self._set_items(self.op_pop_mark(None))

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    # Names, and the operations that would run them

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        path = f"{module}.{name}"
        # A dot in the name would reach into an object (`Model.__init__.__globals__`).
        if "." in name or not (path in self.builders or path in VALUES):
            advice = next((text for prefix, text in ADVICE.items() if path.startswith(prefix)), DEFAULT_ADVICE)
            raise UnsafePickle(f"its pickle names {path[:200]!a}, which is not on the list of harmless names: {advice}")
        self.stack.append(Name(path))

    def op_reduce(self, _: None) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments in a {type(arguments).__name__}")
        if not isinstance(called, Name) or called.path not in self.builders:
            raise UnsafePickle(f"its pickle calls {reprlib.repr(called)}, which is data")
        self.stack.append(self.builders[called.path](called.path, arguments))

    op_newobj = op_reduce

    def op_build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Module):
            if not isinstance(state, dict):
                raise TypeError(f"attributes of {target.path} in a {type(state).__name__}")
            target.state = state
        elif not isinstance(target, dict | set | Opaque):  # what attributes these have does not matter
            raise UnsafePickle(f"its pickle sets attributes of {reprlib.repr(target)}")

    def op_binpersid(self, _: None) -> None:
        self.stack.append(self.load_persistent(self.stack.pop()))
