# SPDX-License-Identifier: Apache-2.0
"""How attributes of a Python object become XML, and how they are read back.

An :class:`Element` lists its properties one a line: the attribute of the object, its name in XML, the kind of value
and the first version of libvirt that knows it. Strings are put together directly and escaped only where that is
needed; lxml is imported when something is parsed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from imagebackend import exceptions, untrusted_xml

if TYPE_CHECKING:
    from lxml import etree

__all__ = [
    "NEWEST",
    "Element",
    "Kind",
    "Property",
    "choice",
    "empty_element",
    "escape",
    "integer",
    "parse_document",
    "path",
    "read_size",
    "switch",
    "text",
]

#: A version of libvirt that knows everything.
NEWEST = sys.maxsize

_MAX_WRITTEN = 1024
# What is its own representation, in an attribute as in text. The rest takes the slow path.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+,=~ -]+\Z")
# The complement of Char in XML 1.0 (https://www.w3.org/TR/xml/#charsets).
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# White space is written as references, or a parser would turn it into spaces (attributes) or newlines (text).
_REFERENCES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
)
_DECIMAL = re.compile(r"[0-9]{1,20}\Z")
# libvirt's "scaled integers", case folded: https://libvirt.org/formatdomain.html#memory-allocation.
_UNITS: dict[str, int] = {"b": 1, "byte": 1, "bytes": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgtpe", 1)
    for suffix, base in (("b", 1000), ("", 1024), ("ib", 1024))
}


class Kind(NamedTuple):
    """A kind of value: ``write(label, value)`` checks it and returns XML, ``read(label, text)`` is the way back.

    ``newer`` maps values to the version of libvirt that introduced them, where that is later than the property's own.
    """

    write: Callable[[str, Any], str]
    read: Callable[[str, str], Any]
    newer: Mapping[str, int] | None = None


class Property(NamedTuple):
    """One attribute of an object and what it is called in XML.

    :ivar attribute: of the Python object.
    :ivar name: of the XML attribute or child element.
    :ivar kind: of the values.
    :ivar since: the first version of libvirt that knows it, as libvirt's integer.
    :ivar needed: leaving it out would give the guest other data: an older libvirt is an error.
    """

    attribute: str
    name: str
    kind: Kind
    since: int = 0
    needed: bool = False


class Element:
    """The properties that one XML element carries, as its attributes or as its children."""

    def __init__(self, *properties: Property) -> None:
        self.properties = properties
        # A name twice, because attrgetter returns a tuple for two names or more.
        names = [each.attribute for each in properties]
        self._values: Callable[[object], tuple[Any, ...]] = attrgetter(*names, names[0])
        self._nothing = (None,) * (len(names) + 1)
        # What the loops below need, so that they look nothing up.
        self._steps = [(each.kind.write, each.attribute, each.name, each) for each in properties]
        # Most disks of a host have the same driver, device and target: what was checked and written before.
        self._written: dict[tuple[Any, ...], str] = {}

    def attributes(self, owner: object, version: int) -> str:
        """Return the XML attributes for what ``owner`` has set, each with a space before it."""
        values = self._values(owner)
        if values == self._nothing:
            return ""
        if version is not NEWEST:
            return self._write_attributes(values, version)
        try:
            written = self._written.get(values)
        except TypeError:  # one of them cannot be hashed: no value that could be written
            written = None
        if written is None:
            written = self._write_attributes(values, version)
            # Strings alone: True would be found where 1 was written.
            if all(value is None or type(value) is str for value in values):
                if len(self._written) >= _MAX_WRITTEN:
                    self._written.clear()
                self._written[values] = written
        return written

    def _write_attributes(self, values: tuple[Any, ...], version: int) -> str:
        out = ""
        for value, (write, attribute, name, each) in zip(values, self._steps, strict=False):
            if value is not None:
                written = write(attribute, value)
                if version is NEWEST or _is_known(each, value, version):
                    out += f' {name}="{written}"'
        return out

    def children(self, owner: object, version: int, indent: str) -> str:
        """Return one XML element for each property that ``owner`` has set, each on a line of its own."""
        values = self._values(owner)
        if values == self._nothing:
            return ""
        out = ""
        for value, (write, attribute, name, each) in zip(values, self._steps, strict=False):
            if value is not None:
                written = write(attribute, value)
                if version is NEWEST or _is_known(each, value, version):
                    out += f"{indent}<{name}>{written}</{name}>\n"
        return out

    def read_attributes(self, node: etree._Element | None) -> dict[str, Any]:
        """Return the properties that are attributes of ``node``, by the object's names."""
        return {} if node is None else self._read(node.get)

    def read_children(self, node: etree._Element | None) -> dict[str, Any]:
        """Return the properties that are children of ``node``, by the object's names."""
        return {} if node is None else self._read(node.findtext)

    def _read(self, find: Callable[[str], str | None]) -> dict[str, Any]:
        found = ((each, find(each.name)) for each in self.properties)
        return {each.attribute: each.kind.read(each.attribute, raw) for each, raw in found if raw is not None}


def _is_known(each: Property, value: Any, version: int) -> bool:
    since = each.since
    if each.kind.newer is not None:
        since = max(since, each.kind.newer.get(value, 0))
    if since <= version:
        return True
    if each.needed:
        raise exceptions.Unsupported(f"{each.attribute}={value}", f"libvirt knows it since {_dotted(since)}")
    return False


def _dotted(version: int) -> str:
    return f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"


def escape(label: str, value: object) -> str:
    """Return ``value`` as it stands between the quotes of an XML attribute, or as text.

    :param label: what the value is, for the error.
    :raises InvalidArgument: it is not a string, it is empty, or it has characters that XML cannot carry.
    """
    if not isinstance(value, str):
        raise exceptions.InvalidArgument(f"{label}: a string is needed, not {value!r:.80}")
    if _PLAIN.match(value):
        return value
    if not value:
        raise exceptions.InvalidArgument(f"{label}: the string is empty")
    illegal = _ILLEGAL.search(value)
    if illegal:
        raise exceptions.InvalidArgument(f"{label}: XML cannot carry {illegal.group()!a} in {value!a:.80}")
    return value.translate(_REFERENCES)


def empty_element(tag: str, attributes: str, indent: str = "  ") -> str:
    """Return an element that is nothing but ``attributes``, on a line of its own; nothing without any."""
    return f"{indent}<{tag}{attributes}/>\n" if attributes else ""


def text(pattern: str = "", meaning: str = "") -> Kind:
    """Return the kind of any string, or of those that match ``pattern`` from start to end.

    :param pattern: it must not let a character through that XML wants escaped.
    :param meaning: the pattern in words, for the error.
    """
    if not pattern:
        return Kind(escape, _as_is)
    matches = re.compile(rf"(?:{pattern})\Z", re.ASCII).match

    def write(label: str, value: object) -> str:
        if not isinstance(value, str) or not matches(value):
            raise exceptions.InvalidArgument(f"{label}: {value!a:.80} is not {meaning}")
        return value

    return Kind(write, _as_is)


def path() -> Kind:
    """Return the kind of absolute paths."""

    def write(label: str, value: object) -> str:
        written = escape(label, value)
        if written[0] != "/":
            raise exceptions.InvalidArgument(f"{label}: {value!a:.80} is not an absolute path")
        return written

    return Kind(write, _as_is)


def _as_is(label: str, raw: str) -> str:
    return raw


def integer(minimum: int, maximum: int) -> Kind:
    """Return the kind of whole numbers from ``minimum`` to ``maximum``; strings of ASCII digits are taken as well."""

    def write(label: str, value: object) -> str:
        number = value
        if isinstance(value, str):
            number = _read_integer(label, value)
        if not isinstance(number, int) or isinstance(number, bool):
            raise exceptions.InvalidArgument(f"{label}: a whole number is needed, not {value!a:.80}")
        if not minimum <= number <= maximum:
            raise exceptions.InvalidArgument(f"{label}: {number} is not between {minimum} and {maximum}")
        return str(number)

    return Kind(write, _read_integer)


def _read_integer(label: str, raw: str) -> int:
    if _DECIMAL.match(raw) is None:
        raise exceptions.InvalidArgument(f"{label}: {raw!a:.80} is not a whole number in ASCII digits")
    return int(raw)


def choice(*values: str, newer: Mapping[str, int] | None = None) -> Kind:
    """Return the kind of values that are one of ``values``.

    :param newer: values that later versions of libvirt added, and those versions.
    """
    known = frozenset(values) | frozenset(newer or ())

    def write(label: str, value: object) -> str:
        if not isinstance(value, str) or value not in known:
            raise exceptions.InvalidArgument(f"{label}: {value!a:.80} is not one of {', '.join(sorted(known))}")
        return value

    return Kind(write, _as_is, newer)


def switch() -> Kind:
    """Return the kind of True and False that libvirt writes as ``on`` and ``off``."""

    def write(label: str, value: object) -> str:
        if not isinstance(value, bool):
            raise exceptions.InvalidArgument(f"{label}: True or False is needed, not {value!a:.80}")
        return "on" if value else "off"

    def read(label: str, raw: str) -> bool:
        if raw not in ("on", "off"):
            raise exceptions.InvalidArgument(f"{label}: {raw!a:.80} is neither on nor off")
        return raw == "on"

    return Kind(write, read)


def read_size(label: str, node: etree._Element) -> int:
    """Return the bytes that a scaled integer means.

    :param node: an element with the number as its text and, perhaps, a unit; without one it is in bytes.
    :raises InvalidArgument: it is not a number, or the unit is not one of libvirt's.
    """
    unit: str = node.get("unit", "bytes")
    scale = _UNITS.get(unit.lower())
    if scale is None:
        raise exceptions.InvalidArgument(f"{label}: {unit!a:.80} is not a unit of size")
    return _read_integer(label, node.text or "") * scale


def parse_document(xml: str, tag: str) -> etree._Element:
    """Return the root of an XML document.

    Document types are refused, so that no entity is ever expanded or fetched.

    :param xml: the document, at most 1 MiB.
    :param tag: what the root must be.
    :raises InvalidArgument: it is too long, has a document type, is not well-formed, or has another root.
    """
    try:
        root = untrusted_xml.parse(xml.encode("utf-8"))
    except ValueError as error:
        raise exceptions.InvalidArgument(f"<{tag}>: {error}") from error
    if root.tag != tag:
        raise exceptions.InvalidArgument(f"<{tag}> was expected, not <{root.tag}>")
    return root
