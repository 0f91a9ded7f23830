"""The front page's first screen: what the book is in numbers, and where to go."""

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import chapters, load_concepts

__all__ = ["numbers", "ways"]


def numbers() -> str:
    """The numbers of the book as they stand, as html."""
    concepts, claims = load_concepts().values(), load_claims().values()
    written = [concept for concept in concepts if concept.is_written]
    whole = {concept.number for concept in written} - {c.number for c in concepts if not c.is_written}
    measured = sum(row.state == "measured" for row in claims)
    rows = [
        (len(chapters()), "chapters", f"{len(whole)} written"),
        (len(concepts), "concepts", f"{len(written)} written"),
        (len(claims), "claims of others", f"{measured} measured"),
    ]
    items = "".join(f"<li><strong>{count}</strong> {what}, <br>{so_far}</li>" for count, what, so_far in rows)
    return f'<ul class="atlas-numbers">{items}</ul>\n'


def ways() -> str:
    """Links to the entrances of the book, the first of them to the first written chapter, as html."""
    first = next(concept for concept in load_concepts().values() if concept.is_written)
    links = [
        (f"{first.chapter}.html", f"Start with chapter {first.number}"),
        ("tables.html", "The 22 tables"),
        ("#run-it", "Run it"),
        ("teach.html", "Teach with it"),
    ]
    shown = "".join(f'<a href="{address}">{text}</a>' for address, text in links)
    return f'<nav class="atlas-ways" aria-label="Ways into the book">{shown}</nav>\n'
