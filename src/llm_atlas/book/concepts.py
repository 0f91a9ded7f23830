"""The concept list: `assets/concepts.yml` read, checked and typed.

Chapters come in reading order, and so do the concepts of a chapter. `needs` are concepts introduced earlier,
`previews` are concepts used as a black box now and opened later; both are checked on loading, so that the map
of the book cannot hold an arrow that points the wrong way.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from llm_atlas.core.assets import bundled

__all__ = ["STATES", "Chapter", "Concept", "chapters", "load_concepts"]

STATES = ("planned", "partial", "done")
_SLUG = re.compile(r"\d\d(-[a-z0-9]+)+")
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One concept of the book.

    `number` and `chapter` are the chapter's number and file name without suffix; `symbol` is the dotted name
    of the implementation, `test` the test that holds it (`path` or `path::name`), `sources` keys of
    references.bib; `missing` says what a partial concept lacks and which chapter brings it.
    """

    id: str
    name: str
    number: int
    chapter: str
    example: str
    facts: tuple[str, ...]
    symbol: str
    test: str
    sources: tuple[str, ...]
    needs: tuple[str, ...] = ()
    previews: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    state: str = "planned"
    missing: str = ""

    @property
    def is_written(self) -> bool:
        """Whether the concept has a section to lead to, be it whole or in part."""
        return self.state != "planned"


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One chapter: its number, title, file name without suffix, and the ids of its concepts in order."""

    number: int
    title: str
    slug: str
    concepts: tuple[str, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML with the line of every mapping kept under `__line__`, and duplicate keys refused."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    line = node.start_mark.line + 1
    found: dict[str, Any] = {"__line__": line}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise ValueError(f"{loader.name}:{key_node.start_mark.line + 1}: key {key!r} stands twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> list[dict[str, Any]]:
    """The mappings of a YAML file that holds one list of them, each with its line under `__line__`."""
    text = path.read_text(encoding="utf-8")
    loader = _Loader(text)
    loader.name = path.name
    try:
        rows = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path.name}:{line}: not YAML: {error.problem}") from None
    finally:
        loader.dispose()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path.name}:1: a list of mappings was wanted")
    return rows


def build(cls: type, row: dict[str, Any], where: str, **given: Any) -> Any:
    """`cls` from the row of a file, every field typed as its dataclass says; ValueError that begins with
    `where`."""
    fields = cls.__dataclass_fields__
    values = dict(given)
    for key, value in row.items():
        if key == "__line__":
            continue
        if key not in fields or key in given:
            raise ValueError(f"{where}: unknown field {key!r}")
        kind = fields[key].type
        if kind is str and not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be text, not {value!r}")
        if kind == tuple[str, ...]:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{where}: {key} must be a list of texts, not {value!r}")
            value = tuple(value)
        values[key] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).partition(') ')[2] or error}") from None


def _check_concept(concept: Concept, where: str) -> None:
    if not _ID.fullmatch(concept.id):
        raise ValueError(f"{where}: id {concept.id!r} must be lower-case words joined by hyphens")
    if concept.state not in STATES:
        raise ValueError(f"{where}: state {concept.state!r} of {concept.id!r} is none of {', '.join(STATES)}")
    if (concept.state == "partial") != bool(concept.missing):
        raise ValueError(
            f"{where}: {concept.id!r} is {concept.state}; `missing` belongs to partial, and only to it"
        )
    for name in ("name", "example", "symbol", "test", "sources", "facts"):
        if not getattr(concept, name):
            raise ValueError(f"{where}: {name} of {concept.id!r} is empty")


def _check_edges(concepts: dict[str, Concept], where: dict[str, str]) -> None:
    order = {id: place for place, id in enumerate(concepts)}
    for concept in concepts.values():
        for edge, targets in (("needs", concept.needs), ("previews", concept.previews)):
            for target in targets:
                if target not in concepts:
                    raise ValueError(
                        f"{where[concept.id]}: {concept.id!r} {edge} {target!r}, which is no concept"
                    )
            if len(set(targets)) < len(targets):
                raise ValueError(f"{where[concept.id]}: {concept.id!r} {edge} a concept twice")
    try:
        TopologicalSorter({c.id: c.needs for c in concepts.values()}).prepare()
    except CycleError as error:
        loop = error.args[1][::-1]
        raise ValueError(f"{where[loop[0]]}: needs form a cycle: {' -> '.join(loop)}") from None
    for concept in concepts.values():
        for target in concept.needs:
            if order[target] > order[concept.id]:
                raise ValueError(
                    f"{where[concept.id]}: {concept.id!r} needs {target!r}, which comes later; "
                    "make it a preview"
                )
        for target in concept.previews:
            if order[target] <= order[concept.id]:
                raise ValueError(
                    f"{where[concept.id]}: {concept.id!r} previews {target!r}, which is not later; "
                    "make it a need"
                )


@lru_cache(maxsize=8)
def _load(path: Path) -> tuple[dict[str, Concept], tuple[Chapter, ...]]:
    concepts: dict[str, Concept] = {}
    where: dict[str, str] = {}
    found = []
    for number, row in enumerate(read_yaml(path), start=1):
        place = f"{path.name}:{row['__line__']}"
        slug, title = row.get("slug"), row.get("title")
        if row.get("number") != number:
            raise ValueError(f"{place}: chapter number {row.get('number')!r}, wanted {number}")
        if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or int(slug[:2]) != number:
            raise ValueError(f"{place}: slug {slug!r} must be like {number:02d}-short-name")
        if not isinstance(title, str) or not isinstance(row.get("concepts"), list):
            raise ValueError(f"{place}: a chapter has number, title, slug and concepts")
        ids = []
        for entry in row["concepts"]:
            here = f"{path.name}:{entry['__line__']}"
            concept = build(Concept, entry, here, number=number, chapter=slug)
            _check_concept(concept, here)
            if concept.id in concepts:
                raise ValueError(f"{here}: id {concept.id!r} stands twice, first at {where[concept.id]}")
            concepts[concept.id], where[concept.id] = concept, here
            ids.append(concept.id)
        found.append(Chapter(number=number, title=title, slug=slug, concepts=tuple(ids)))
    _check_edges(concepts, where)
    return concepts, tuple(found)


def load_concepts(path: Path | None = None) -> dict[str, Concept]:
    """All concepts by id, in reading order; of the book's own list unless `path` is given.

    ValueError that names file and line where the list breaks a rule: an unknown or repeated id, a need that
    is unknown, cyclic or not introduced earlier, an unknown state, an empty field.
    """
    return dict(_load(path or bundled("concepts.yml"))[0])


def chapters(path: Path | None = None) -> tuple[Chapter, ...]:
    """All chapters in order; errors as `load_concepts`."""
    return _load(path or bundled("concepts.yml"))[1]
