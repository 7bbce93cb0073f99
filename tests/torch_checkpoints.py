"""PyTorch checkpoints made by hand, without PyTorch: the pickle operations one by one, so that tests can bend them."""

import io
import struct
import zipfile

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage", "u1": "ByteStorage"}


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def list_of(*items):
    return b"](" + b"".join(items) + b"e"


def dict_of(items):
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def storage(key, count, kind="FloatStorage"):
    return tuple_of(text("storage"), named("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(key, count, shape, strides=None, offset=0, kind="FloatStorage"):
    """A view into the storage with this key, which has `count` elements; contiguous without strides."""
    if strides is None:
        strides = [1]
        for length in reversed(shape[1:]):
            strides.insert(0, strides[0] * length)
        strides = strides[: len(shape)]
    return call(
        named("torch._utils", "_rebuild_tensor_v2"),
        storage(key, count, kind),
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, strides)),
        b"\x89",
        call(named("collections", "OrderedDict")),
    )


def pickle_of(value, protocol=2):
    return b"\x80" + bytes([protocol]) + value + b"."


def zip_checkpoint(value, storages, compression=zipfile.ZIP_STORED, more=None):
    """The archive that PyTorch writes since 1.6; `storages` are the bytes by key."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle_of(value))
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
        for name, content in (more or {"byteorder": b"little", "version": b"3\n"}).items():
            file.writestr(f"archive/{name}", content)
    return archive.getvalue()


def legacy_checkpoint(value, storages, little_endian=True):
    """What PyTorch wrote before; `storages` are count and bytes by key."""
    system = dict_of({"protocol_version": number(1001), "little_endian": b"\x88" if little_endian else b"\x89"})
    keys = list_of(*map(text, storages))
    pickles = b"".join(map(pickle_of, (number(MAGIC), number(1001), system, value, keys)))
    return pickles + b"".join(struct.pack("<q", count) + content for count, content in storages.values())
