"""Pytrees: attrs classes as nodes, names for leaves, maps that see the name.

A tree is nested dicts, lists, tuples and classes decorated with `pytree`; a leaf
is anything else.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs
from torch.utils import _pytree as torch_pytree

Tree = Any
T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Registers an attrs class as a pytree node; its children are the fields that are not None."""
    names = tuple(field.name for field in attrs.fields(cls))  # pyright: ignore[reportArgumentType]

    def flatten(node: Any) -> tuple[list[Any], tuple[str, ...]]:
        present = tuple(name for name in names if getattr(node, name) is not None)
        return [getattr(node, name) for name in present], present

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        children, present = flatten(node)
        keys = [torch_pytree.GetAttrKey(name) for name in present]
        return list(zip(keys, children, strict=True)), present

    def unflatten(children: Iterable[Any], present: tuple[str, ...]) -> T:
        return cls(**dict.fromkeys(names) | dict(zip(present, children, strict=True)))

    torch_pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls


def path_name(path: tuple[Any, ...]) -> str:
    """`params.layers.wq`: the keys of a leaf joined by dots."""
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    return ".".join(parts)


def leaves_with_names(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves by their dotted names, in tree order. Raises ValueError when two share a name."""
    flat, _ = torch_pytree.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = {path_name(path): leaf for path, leaf in flat}
    if len(named) != len(flat):
        names = [path_name(path) for path, _ in flat]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves of one tree share the name(s) {twice}; no key may hold a dot")
    return named


def map_with_name(
    function: Callable[..., Any],
    tree: Tree,
    *rest: Tree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Tree:
    """`function(name, leaf, *rest_leaves)` on every leaf; the trees have one structure."""
    return torch_pytree.tree_map_with_path(
        lambda path, leaf, *others: function(path_name(path), leaf, *others),
        tree,
        *rest,
        is_leaf=is_leaf,
    )


tree_map = torch_pytree.tree_map
tree_leaves = torch_pytree.tree_leaves
tree_flatten = torch_pytree.tree_flatten
tree_unflatten = torch_pytree.tree_unflatten


def pick(tree: Tree, wanted: Tree) -> Tree:
    """The part of nested dicts whose leaves are True in `wanted`, without dicts that are empty."""
    if not isinstance(wanted, dict):
        return tree
    some = {name: want for name, want in wanted.items() if any(tree_leaves(want))}
    return {name: pick(tree[name], want) for name, want in some.items()}


def put_back(part: Tree, whole: Tree) -> Tree:
    """`whole` with the leaves of a part of it (see `pick`) in place of its own."""
    if not isinstance(part, dict):
        return part
    return {name: put_back(part[name], x) if name in part else x for name, x in whole.items()}
