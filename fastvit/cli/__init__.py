"""The command line: ``fastvit --help`` lists its commands. Errors are one line on stderr and a non-zero exit."""

import sys


def main() -> None:
    """Entry point of ``fastvit`` and of ``python -m fastvit``."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"fastvit: the command line needs {error.name}: pip install 'fastvit[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from .app import run

    run()
