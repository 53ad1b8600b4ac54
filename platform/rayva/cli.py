"""`rayva ...`: local tools that need no cluster."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from rayva import __version__
from rayva.commands import COMMANDS
from rayva.errors import RayvaError
from rayva.interruption import Interruptions

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Returns its exit code; 2 for an error to mend, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not arguments or arguments[0] not in COMMANDS:
        return _overview(arguments)
    name = arguments[0]
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"rayva {name}", description=module.__doc__)
    module.add_arguments(parser)
    # Settings may stand before and after options; argparse cannot have that beside subcommands.
    parse = parser.parse_args if getattr(module, "SUBCOMMANDS", False) else parser.parse_intermixed_args
    try:
        with Interruptions():
            code = int(module.run(parse(arguments[1:])))
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what Python still holds back is written nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RayvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _overview(arguments: Sequence[str]) -> int:
    """Help, the version, or argparse's own complaint about an unknown command."""
    parser = argparse.ArgumentParser(prog="rayva", description=__doc__)
    parser.add_argument("--version", action="version", version=f"rayva {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about)
    if not arguments:
        parser.print_help()
        return 0
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
