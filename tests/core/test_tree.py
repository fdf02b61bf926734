"""Classes as nodes of trees."""

from attrs import frozen

from omnistep.core.tree import pytree, tree_leaves, tree_map


@pytree
@frozen
class Node:
    first: int
    absent: int | None
    last: int = 7


def test_a_field_that_is_none_is_no_child_and_stays_none():
    node = Node(1, None, 2)
    assert tree_leaves(node) == [1, 2]
    assert tree_map(lambda leaf: leaf * 10, node) == Node(10, None, 20)
    assert tree_map(lambda leaf: leaf * 10, Node(1, 2)) == Node(10, 20, 70)
