"""Detect content that may run code when a file is opened, whatever the file's name."""

import mmap
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from xml.etree import ElementTree

# First bytes of archives and compressed files, which hide their content. `torch.save` writes zip files, joblib others.
_ARCHIVES = (
    *(b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
    *(b"\x04\x22\x4d\x18", b"]\0\0"),
)
# First bytes of NumPy and HDF5 files, which may hold pickles.
_ARRAYS = (b"\x93NUMPY", b"\x89HDF\r\n\x1a\n")
_PROGRAMS = (
    *(b"#!", b"\x7fELF", b"MZ", b"\0asm"),
    *(b"\xfe\xed\xfa", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"),
)
# First bytes of images, by suffix.
_IMAGES = {
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".jpg": rb"\xff\xd8\xff",
    ".jpeg": rb"\xff\xd8\xff",
    ".gif": rb"GIF8[79]a",
    ".webp": rb"RIFF.{4}WEBP",
}
# Pickle opcodes that import an object, and those that call or modify an imported one.
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
_IMPORTED = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*")
# SVG elements that run code or show another page.
_HTML = "{http://www.w3.org/1999/xhtml}"
_ACTIVE = {"script", "foreignobject", "iframe", "object", "embed", "handler", "listener", "animate", "set"}


def what_runs(file: Path) -> str | None:
    """A few words on what ``file`` is, if opening it with its usual program may run code; else None.

    The file is memory-mapped and read at its beginning and end; no tensors are loaded.
    """
    if file.stat().st_size == 0:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        beginning = content[:512]
        if beginning.startswith(_PROGRAMS):
            return "a program"
        if beginning.startswith(_ARCHIVES) or beginning[257:262] == b"ustar" or _is_zlib(beginning):
            return "an archive"
        if beginning.startswith(_ARRAYS):
            return "NumPy or HDF5"
        if _is_pickle(content):
            return "a pickle"
    # A zip archive may follow arbitrary bytes.
    if _ends_as_zip(file):
        return "an archive"
    kind = file.suffix.lower()
    if kind in _IMAGES and not re.match(_IMAGES[kind], beginning, re.DOTALL):
        return f"not the image that {kind} says"
    return _active_drawing(file) if kind == ".svg" else None


def _is_zlib(beginning: bytes) -> bool:
    if beginning[:1] != b"\x78":
        return False
    try:
        return bool(zlib.decompressobj().decompress(beginning))
    except zlib.error:
        return False


def _ends_as_zip(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, RuntimeError):
        return False


def _is_pickle(content: mmap.mmap) -> bool:
    """Whether unpickling would reach a call, or end with a value; also for pickles truncated after that.

    Plain text may look like a pickle of protocol 0 or 1: so opcodes must find their operands on the stack, and an
    import must precede a call, or the end of a pickle without a protocol opcode.
    """
    content.seek(0)
    stack: list[object] = []
    imported = declared = False
    try:
        for operation, argument, _ in _operations(content):
            _apply(operation, stack)
            if operation.name in ("GLOBAL", "INST") and not _IMPORTED.fullmatch(str(argument)):
                return False
            imported |= operation.name in _IMPORTS
            declared |= operation.name == "PROTO"
            if imported and operation.name in _CALLS:
                return True
    except (ValueError, LookupError, ArithmeticError):  # not an opcode, or its operand is missing
        return False
    return imported or declared


def _operations(content: mmap.mmap) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    with warnings.catch_warnings():
        # About escapes in data that may not be a pickle.
        warnings.simplefilter("ignore")
        yield from pickletools.genops(cast(IO[bytes], content))


def _apply(operation: pickletools.OpcodeInfo, stack: list[object]) -> None:
    """Apply the stack effect of an opcode; raises an `IndexError` on underflow."""
    mark = pickletools.markobject
    taken = list(operation.stack_before)
    if mark in taken or (operation.name == "POP" and stack and stack[-1] is mark):
        while stack.pop() is not mark:
            pass
        taken = taken[: taken.index(mark)] if mark in taken else []
    if len(stack) < len(taken):
        raise IndexError(operation.name)
    del stack[len(stack) - len(taken) :]
    stack.extend(operation.stack_after)


def _active_drawing(file: Path) -> str | None:
    """The first script, event handler or external reference of an SVG file, in words; None if there is none."""
    content = file.read_bytes()
    # Without zero bytes UTF-16 text reads as ASCII. Entities could hide anything.
    if re.search(rb"<!ENTITY|<\?xml-stylesheet", content.replace(b"\0", b""), re.IGNORECASE):
        return "a drawing with entities or style sheets of its own"
    try:
        elements = list(ElementTree.fromstring(content).iter())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return f"no valid drawing ({error})"
    for element in elements:
        tag = _local(element.tag)
        if tag in _ACTIVE or str(element.tag).startswith(_HTML):
            return f"a drawing with <{tag}>"
        if tag == "style" and (reason := _fetches("".join(element.itertext()))):
            return reason
        for name, value in element.attrib.items():
            name, value = _local(name), value.strip()
            if name.startswith("on"):
                return f"a drawing with {name}="
            if name in ("href", "src") and not value.startswith(("#", "data:image/png;", "data:image/jpeg;")):
                return f"a drawing that refers to {value[:60]}"
            if reason := _fetches(value):
                return reason
    return None


def _fetches(style: str) -> str | None:
    pattern = r"@import|javascript:|\\|image-set\(|\bsrc\(|url\(\s*['\"]?(?![\s#'\"])[^)]{0,60}"
    if found := re.search(pattern, style, re.IGNORECASE):
        return f"a drawing that refers to {found[0]}"
    return None


def _local(name: object) -> str:
    """A tag or attribute name without its namespace."""
    return str(name).rpartition("}")[2].lower()
