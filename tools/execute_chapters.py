"""Execute the chapters in place and leave them in one normal form, so that a second run changes nothing.

A cell tagged nbval-ignore-output (a timing, a trained loss) would change at every run. It remembers a digest
of the code it was made from, its own and that of all cells above it, and keeps its stored output while that
digest holds; --refresh replaces those too. A run that fails, or writes to stderr, changes no file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import build_site
import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from PIL import Image

ROOT = build_site.ROOT
IGNORED = "nbval-ignore-output"
DIGEST = "llm_atlas"  # the key of a cell's metadata that holds {"sources": digest}
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
CELL_METADATA = ("tags", "mystnb", DIGEST)
COLAB = "https://colab.research.google.com"


class OwnKernel(AsyncKernelManager):
    """This environment's own ipykernel, whatever kernels called python3 the user's machine has."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold code."""
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def source_digests(nb: NotebookNode) -> dict[str, str]:
    """For each code cell's id, a digest of its code and of all the code above it."""
    running, digests = hashlib.sha256(), {}
    for cell in code_cells(nb):
        running.update(cell.source.encode() + b"\0")
        digests[cell.id] = running.hexdigest()[:16]
    return digests


def _identify(nb: NotebookNode) -> None:
    """Give every cell a valid id that no other has, the same at every run; ids that are so already stay."""
    seen: set[str] = set()
    for index, cell in enumerate(nb.cells):
        name = cell.get("id", "")
        if name in seen or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
            name = hashlib.sha256(f"{index}\0{cell.source}".encode()).hexdigest()[:8]
        while name in seen:
            name = hashlib.sha256(name.encode()).hexdigest()[:8]
        cell["id"] = name
        seen.add(name)


def slim(png: str) -> str:
    """A png (in base64) with a palette of 128 colours, a third of the bytes; one that has a palette stays."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    buffer = io.BytesIO()
    image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def normalise(nb: NotebookNode) -> NotebookNode:
    """The one form in which a notebook is committed: a copy, its code and what its cells show unchanged.

    Fixed kernel and language metadata, no editor's or execution's metadata, no widget state and no widget
    views (their ids are random), pictures with a palette, streams joined, execution counts 1, 2, ..., valid and
    unique cell ids.
    """
    nb = nbformat.from_dict(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict(METADATA)
    _identify(nb)
    count = 0
    for cell in nb.cells:
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in CELL_METADATA if cell.metadata.get(key)}
        )
        if cell.cell_type != "code":
            continue
        if IGNORED not in tags(cell):
            cell.metadata.pop(DIGEST, None)
        if cell.source.strip():
            count += 1
        executed = cell.execution_count is not None
        cell.execution_count = count if executed and cell.source.strip() else None
        outputs: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
                continue
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
            if "data" in output:
                output.data.pop(WIDGET, None)
                if "image/png" in output.data:
                    output.data["image/png"] = slim(output.data["image/png"])
                if not output.data:
                    continue
            outputs.append(output)
        cell.outputs = outputs
    return nb


def with_colab(nb: NotebookNode, address: str, path: str) -> NotebookNode:
    """A copy with the two cells that Colab needs after the title: a badge, and the package's installation.

    The site shows neither (it has launch buttons). Without an address the copy has none of them.
    """
    nb = nbformat.from_dict(nb)
    nb.cells = [cell for cell in nb.cells if cell.get("id") not in ("colab-badge", "colab-install")]
    if address:
        link = f"{COLAB}/github/{address.removeprefix('https://github.com/')}/blob/main/{path}"
        badge = nbformat.v4.new_markdown_cell(
            f"[![Open this chapter in Colab]({COLAB}/assets/colab-badge.svg)]({link})",
            id="colab-badge",
            metadata={"tags": ["remove-cell"]},
        )
        install = nbformat.v4.new_code_cell(
            f'import sys\n\nif "google.colab" in sys.modules:\n    %pip install -q "git+{address}"',
            id="colab-install",
            metadata={"tags": ["remove-cell"]},
        )
        nb.cells[1:1] = [badge, install]
    return nb


def keep_stored(new: NotebookNode, old: NotebookNode) -> int:
    """Put the outputs of `old` back where a tagged cell was made from the same code; how many were.

    Every tagged cell of `new` gets its digest.
    """
    digests = source_digests(new)
    stored = {cell.id: cell for cell in code_cells(old) if "id" in cell}
    kept = 0
    for cell in code_cells(new):
        if IGNORED not in tags(cell):
            continue
        cell.metadata[DIGEST] = NotebookNode(sources=digests[cell.id])
        before = stored.get(cell.id)
        if before is not None and before.outputs and before.metadata.get(DIGEST) == cell.metadata[DIGEST]:
            cell.outputs = nbformat.from_dict(before.outputs)
            kept += 1
    return kept


def stale(nb: NotebookNode) -> list[str]:
    """The ids of tagged cells whose stored output was made from other code than the notebook now has."""
    digests = source_digests(nb)
    return [
        cell.id
        for cell in code_cells(nb)
        if IGNORED in tags(cell) and cell.metadata.get(DIGEST) != {"sources": digests[cell.id]}
    ]


def execute(nb: NotebookNode, folder: Path, *, cell_seconds: float) -> NotebookNode:
    """Run a copy of `nb` in a fresh kernel of this environment, as from `folder`."""
    nb = nbformat.from_dict(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        nb,
        timeout=cell_seconds,
        resources={"metadata": {"path": str(folder)}},
        kernel_manager_class=OwnKernel,
        coalesce_streams=True,
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    ).execute()
    for cell in code_cells(nb):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise ValueError(
                    f"cell {cell.id} wrote to stderr; mend its cause: {output.text.strip()[:2000]}"
                )
    return nb


def dumps(nb: NotebookNode) -> str:
    return nbformat.writes(nb, version=4) + "\n"


def update(path: Path, *, address: str, cell_seconds: float, refresh: bool) -> str:
    """Execute and rewrite one notebook; what happened, in a word or two."""
    before = path.read_text(encoding="utf-8")
    old = nbformat.reads(before, as_version=4)
    # Ids first: the digests and the stored outputs are found by them.
    source = normalise(with_colab(old, address, str(path.relative_to(ROOT))))
    new = normalise(execute(source, path.parent, cell_seconds=cell_seconds))
    kept = keep_stored(new, nbformat.v4.new_notebook() if refresh else source)
    new = normalise(new)
    nbformat.validate(new)
    after = dumps(new)
    if after == before:
        return "unchanged"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(after, encoding="utf-8")
    os.replace(partial, path)
    return f"written, {kept} tagged outputs kept" if kept else "written"


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the chapters in place, in one normal form.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of chapters/")
    parser.add_argument(
        "--refresh", action="store_true", help="replace the stored outputs of tagged cells too"
    )
    parser.add_argument(
        "--cell-limit", type=float, default=180, metavar="SECONDS", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.notebooks] or sorted((ROOT / "chapters").glob("*.ipynb"))
    address, failed = build_site.repository(ROOT), 0
    for path in paths:
        begin = time.perf_counter()
        try:
            word = update(path, address=address, cell_seconds=arguments.cell_limit, refresh=arguments.refresh)
        except (CellExecutionError, CellTimeoutError, ValueError) as error:
            failed += 1
            word = f"FAILED, left as it was\n{error}"
        print(f"{path.name}: {time.perf_counter() - begin:.1f} s, {word}", flush=True)
    if not paths:
        print("There is no notebook in chapters/ yet.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
