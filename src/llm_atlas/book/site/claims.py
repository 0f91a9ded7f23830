"""The claims page: every claim of the ledger, what was measured and the verdict."""

__all__ = ["markdown"]


def markdown() -> str:
    return ""
