# SPDX-License-Identifier: Apache-2.0
"""How the deltas of a ploop disk hang together, as snapshots come and go, in whatever tree they are found."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from imagebackend.images import ploop_tree
from imagebackend.images.ploop_tree import Tree
from imagebackend.storage import ploop
from imagebackend.storage.ploop import ROOT_IMAGE, TOP, Delta, Descriptor

MIB = 1 << 20
SINGLE = Descriptor(64 * MIB, MIB, (Delta(TOP, None, ROOT_IMAGE),))


def checked(descriptor: Descriptor) -> Descriptor:
    """Make sure that a descriptor is one that would be read."""
    read = ploop.parse_descriptor(ploop.format_descriptor(descriptor), "descriptor")
    assert read == descriptor
    return read


def tree_of(descriptor: Descriptor) -> Tree:
    """Return the tree as it is read from a disk into whose empty root nothing was merged."""
    empty = [delta.guid for delta in descriptor.deltas if ploop_tree.may_be_empty(delta)]
    return Tree(descriptor, empty[0] if empty else None)


def with_snapshot(descriptor: Descriptor, name: str) -> Descriptor:
    whole = {ploop_tree.new_guid(): ploop_tree.snapshot_image(name)}
    return checked(tree_of(descriptor).rearranged(whole=whole))


def without(descriptor: Descriptor, name: str) -> Descriptor:
    tree = tree_of(descriptor)
    snapshot = tree.find_snapshot(name)
    assert snapshot is not None
    whole = {child.guid: ploop_tree.new_image(child) for child in tree.children(snapshot.guid)}
    return checked(tree.rearranged(whole=whole, drop=[snapshot.guid]))


def names_of(descriptor: Descriptor) -> list[str]:
    return [ploop_tree.snapshot_name(each) for each in tree_of(descriptor).snapshots]


@st.composite
def found(draw: st.DrawFn) -> Descriptor:
    """What ploop(8) may have made: any tree, with the disk's usual name anywhere in it."""
    guids = [f"{{{uuid.UUID(int=number)}}}" for number in draw(st.sets(st.integers(1, 1 << 127), max_size=6))]
    guids.append(TOP)
    names = [ROOT_IMAGE, "root.hds@one", "root.hds.empty", *(f"root.hds.{guid}" for guid in guids)]
    files = draw(st.permutations(names))
    parents = [None, *(guids[draw(st.integers(0, number - 1))] for number in range(1, len(guids)))]
    deltas = map(Delta, guids, parents, files)
    return checked(Descriptor(64 * MIB, MIB, tuple(deltas)))


def test_snapshots_are_beside_the_disk_and_leave_nothing() -> None:
    two = with_snapshot(with_snapshot(SINGLE, "one"), "two")

    assert names_of(two) == ["one", "two"]
    assert two.top.file == ROOT_IMAGE
    for delta in (two.top, *tree_of(two).snapshots):
        assert tree_of(two).layers(delta.guid) == [delta]
    assert without(without(two, "one"), "two") == SINGLE


def test_what_is_rolled_back_to_stays() -> None:
    one = with_snapshot(SINGLE, "one")
    image = ploop_tree.new_image()

    rolled_back = checked(tree_of(one).rearranged(whole={TOP: image}, size=32 * MIB))

    assert (rolled_back.top.file, rolled_back.virtual_size) == (image, 32 * MIB)
    assert tree_of(rolled_back).find_snapshot("one") == tree_of(one).find_snapshot("one")
    assert tree_of(rolled_back).tidied().top.file == ROOT_IMAGE


def test_a_root_that_something_was_merged_into_is_a_snapshot_like_any_other() -> None:
    one = with_snapshot(SINGLE, "one")
    [root] = [delta for delta in one.deltas if delta.parent is None]
    full = Tree(one)  # whose root has data

    assert full.layers(TOP) == [root, one.top]
    assert root in full.snapshots
    assert full.tidied() == one
    more = checked(full.rearranged(whole={TOP: ploop_tree.new_image()}))
    assert len({delta.file for delta in more.deltas}) == len(one.deltas) + 1


@given(descriptor=found())
def test_of_any_tree_snapshots_can_be_made_and_removed_to_the_last(descriptor: Descriptor) -> None:
    descriptor = checked(tree_of(descriptor).tidied())
    before = {delta.guid: tree_of(descriptor).layers(delta.guid) for delta in descriptor.deltas}
    names = names_of(descriptor)

    more = with_snapshot(descriptor, "new")

    for guid, layers in before.items():
        if guid != tree_of(descriptor).empty:
            assert [each.file for each in tree_of(more).layers(guid)] == [each.file for each in layers]
    assert names_of(more) == [*names, "new"]
    for name in (*names, "new"):
        more = without(more, name)
    assert names_of(more) == []
    assert len(tree_of(more).tidied().deltas) == 1


@given(descriptor=found())
def test_a_tidy_disk_has_its_usual_name_or_none_of_a_snapshot(descriptor: Descriptor) -> None:
    tidy = checked(tree_of(descriptor).tidied())

    others = {delta.file for delta in tidy.deltas if delta.guid != TOP}
    assert (tidy.top.file == ROOT_IMAGE) == (ROOT_IMAGE not in others)
    assert not tidy.top.file.startswith("root.hds@")
    assert tree_of(tidy).tidied() == tidy
