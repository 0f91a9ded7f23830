"""The front page's first screen: what the book is in numbers, and where to go."""

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import chapters, load_concepts

__all__ = ["markdown"]


def markdown() -> str:
    """The numbers of the book as they stand, and links to its three entrances, as html."""
    concepts, claims = load_concepts().values(), load_claims().values()
    written = [concept for concept in concepts if concept.state != "planned"]
    begun = {concept.number for concept in written}
    whole = begun - {concept.number for concept in concepts if concept.state == "planned"}
    measured = sum(row.state == "measured" for row in claims)
    numbers = [
        (len(chapters()), "chapters", f"{len(whole)} written"),
        (len(concepts), "concepts", f"{len(written)} written"),
        (len(claims), "claims of others", f"{measured} measured"),
    ]
    items = "".join(
        f"<li><strong>{count}</strong> {what},<br>{so_far}</li>" for count, what, so_far in numbers
    )
    first = next(chapter for chapter in chapters() if chapter.number in begun)
    ways = [
        (f"{first.slug}.html", f"Start with chapter {first.number}"),
        ("tables.html", "The 22 tables"),
        ("#run-it", "Run it"),
        ("teach.html", "Teach with it"),
    ]
    links = "".join(f'<a href="{address}">{text}</a>' for address, text in ways)
    return (
        f'<ul class="atlas-numbers">{items}</ul>\n'
        f'<nav class="atlas-ways" aria-label="Ways into the book">{links}</nav>\n'
    )
