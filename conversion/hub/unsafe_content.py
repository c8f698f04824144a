"""What a file is by its content, whatever its name, where that could run code on whoever opens it."""

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

# How archives and compressed files begin, which hide what they hold. `torch.save` writes zip files, joblib the others.
_ARCHIVES = (
    *(b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
    *(b"\x04\x22\x4d\x18", b"]\0\0"),
)
# Of NumPy and HDF5, which may hold pickles.
_ARRAYS = (b"\x93NUMPY", b"\x89HDF\r\n\x1a\n")
_PROGRAMS = (
    *(b"#!", b"\x7fELF", b"MZ", b"\0asm"),
    *(b"\xfe\xed\xfa", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"),
)
# How images begin, by the endings of their names.
_IMAGES = {
    ".png": rb"\x89PNG\r\n\x1a\n",
    ".jpg": rb"\xff\xd8\xff",
    ".jpeg": rb"\xff\xd8\xff",
    ".gif": rb"GIF8[79]a",
    ".webp": rb"RIFF.{4}WEBP",
}
# Operations of pickles: those that fetch something importable, and those that call or change what was fetched.
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
_IMPORTED = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*")
# Elements of a drawing that run something or show another page.
_HTML = "{http://www.w3.org/1999/xhtml}"
_ACTIVE = {"script", "foreignobject", "iframe", "object", "embed", "handler", "listener", "animate", "set"}


def what_runs(file: Path) -> str | None:
    """What ``file`` is, if opening it by what it is made for may run code: of a few words, or None.

    No tensors are read: a file is mapped into memory and looked at from both ends.
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
    # A zip file may have anything before it.
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
    """Whether unpickling would come to a call, or to an end with a value; so also in a pickle that breaks off later.

    Text may begin as pickles of protocols 0 and 1 do: operations must find on the stack what they take from it, and
    something must have been imported before a call counts, or before the end of a pickle that does not say that it is
    one.
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
    except (ValueError, LookupError, ArithmeticError):  # no operation, or it lacks an argument
        return False
    return imported or declared


def _operations(content: mmap.mmap) -> Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]:
    with warnings.catch_warnings():
        # Of escapes in what may be no pickle at all.
        warnings.simplefilter("ignore")
        yield from pickletools.genops(cast(IO[bytes], content))


def _apply(operation: pickletools.OpcodeInfo, stack: list[object]) -> None:
    """Take from the stack and put on it what an operation does; raises an `IndexError` if there is too little."""
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
    """What is wrong with an SVG file: scripts, handlers, and whatever it would fetch from elsewhere."""
    content = file.read_bytes()
    # Drop the zeros, and text of two bytes a character is text of one. An entity can stand for anything.
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
    """Without its namespace."""
    return str(name).rpartition("}")[2].lower()
