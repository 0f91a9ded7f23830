"""Build the site into _build/html, warnings as errors; nothing at all when no source has changed.

Sources are compared by content, so that a fresh checkout's times and a removed file are both seen. Sphinx
keeps the pages it has read: after a build with a warning a second run would pass in silence. So a stamp is
written only by a clean build, a failed one loses what Sphinx remembers, and only changes inside chapters/ are
built incrementally: whatever else changes (package, assets, configuration) can reach any page.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import check_pages
import limit
import yaml

from llm_atlas.book.site import validate

ROOT = Path(__file__).resolve().parent.parent
# Suffixes that the editors and tools of a working tree leave behind and no page is made from.
IGNORED = {".pyc", ".swp", ".tmp"}


def sources(root: Path) -> dict[str, str]:
    """The digest of every file that a page is made from, by its path."""
    files = [root / name for name in ("_config.yml", "_toc.yml", "pyproject.toml", "requirements.txt")]
    for folder in ("chapters", "assets", "src", "tools"):
        files += [
            file
            for file in sorted((root / folder).rglob("*"))
            if file.is_file()
            and file.suffix not in IGNORED
            and not any(
                part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts
            )
        ]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def repository(root: Path) -> str:
    """The repository's address from its one place, pyproject.toml; empty while there is none."""
    address = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["llm-atlas"]["repository"]
    if address and not address.startswith("https://github.com/"):
        raise ValueError(f"repository {address!r} in pyproject.toml must start with https://github.com/")
    return address.rstrip("/")


def configuration(config: dict, address: str) -> dict:
    """A copy of `config` with the repository's links and launch buttons, which need an address."""
    config = copy.deepcopy(config)
    if address:
        config["sphinx"]["config"]["html_theme_options"] |= {
            "repository_url": address,
            "repository_branch": "main",
            "path_to_docs": "",
            "launch_buttons": {"colab_url": "https://colab.research.google.com"},
            "use_repository_button": True,
            "use_issues_button": True,
            "use_edit_page_button": True,
        }
    return config


def is_incremental(old: dict[str, str], new: dict[str, str]) -> bool:
    """Whether what changed since `old` lies in chapters/ alone and removed nothing."""
    changed = {name for name in new if old.get(name) != new[name]}
    return set(old) <= set(new) and all(name.startswith("chapters/") for name in changed)


def page_faults(root: Path, html: Path) -> list[str]:
    """Faults of the built pages; a dead link with the file and the line where it was written."""
    faults = []
    for fault in check_pages.site_problems(html):
        link = re.fullmatch(r"(\S+): dead (?:link|anchor) (\S+)", fault)
        faults.append(f"{validate.place(link[1], link[2], root)}: {fault}" if link else fault)
    return faults


def _said(faults: list[str], what: str) -> bool:
    """Whether there are faults, once they have been printed."""
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        print(f"The site {what}: {len(faults)} fault{'s' * (len(faults) > 1)}", file=sys.stderr)
    return bool(faults)


def build(root: Path, *, seconds: float, force: bool = False) -> int:
    output = root / "_build"
    page, stamp = output / "html" / "index.html", output / "site.json"
    new = sources(root)
    old = json.loads(stamp.read_text()) if stamp.exists() and page.exists() else {}
    if new == old and not force:
        print(f"The site is up to date: {page}")
        return 0

    stamp.unlink(missing_ok=True)
    if _said(validate.problems(root), "is not built"):
        return 1
    if force or not is_incremental(old, new):
        for folder in ("html", ".doctrees"):
            shutil.rmtree(output / folder, ignore_errors=True)
    output.mkdir(exist_ok=True)
    config = configuration(yaml.safe_load((root / "_config.yml").read_text()), repository(root))
    (output / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))

    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-q", "-W", "-n", "--keep-going"]
    status = limit.run([*command, "--config", "_build/config.yml", "."], seconds, cwd=str(root))
    if status:
        shutil.rmtree(output / ".doctrees", ignore_errors=True)
        print(
            f"The site was not built: the command ended with {status}, warnings are errors", file=sys.stderr
        )
        return status
    if _said(page_faults(root, output / "html"), "has faults"):
        return 1
    stamp.write_text(json.dumps(new, indent=0))
    print(f"The site is built: {page}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the site into _build/html, warnings as errors.")
    parser.add_argument("--force", action="store_true", help="build every page anew")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="default: %(default)s")
    arguments = parser.parse_args()
    return build(ROOT, seconds=arguments.limit, force=arguments.force)


if __name__ == "__main__":
    sys.exit(main())
