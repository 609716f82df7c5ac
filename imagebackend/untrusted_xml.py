# SPDX-License-Identifier: Apache-2.0
"""XML that somebody else may have written: bounded, without document types, entities and network."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["LARGEST", "parse"]

#: The most bytes, or characters, of a document that is read.
LARGEST = 1 << 20


def parse(content: bytes) -> etree._Element:
    """Return the root of a document in UTF-8, without its comments and processing instructions.

    Document types are refused, so that no entity is ever expanded or fetched.

    :raises ValueError: it is too long, has a document type, or is not well-formed.
    """
    from lxml import etree

    if len(content) > LARGEST:
        raise ValueError(f"{len(content)} characters of XML, at most {LARGEST} are read")
    if b"<!DOCTYPE" in content:
        raise ValueError("XML with a document type is refused")
    # The encoding is given here, so that a declaration in the document cannot choose another one.
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        return etree.fromstring(content, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(str(error)) from error
