"""The command `ctmasknet`: every subcommand calls one public function and prints what it says.

A flag has the name of the argument it sets, a command's docstring is its help, and its result the exit code (None: 0).
torch is imported by the subcommands that need it, so that `ctmasknet list` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ctmasknet.cli.parser import build_parser
from ctmasknet.cli.shared import as_flags, printable
from ctmasknet.errors import CTMaskNetError


class _Printable(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 fine, 1 a check of `doctor` failed, 2 the user has something to mend."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks is shown escaped
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    level = logging.ERROR if options.quiet else logging.INFO if options.verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("ctmasknet").setLevel(level)
    # pydicom logs and warns of every UID and number of odd form, file by file, and reads them all the same.
    logging.getLogger("pydicom").disabled = True
    warnings.filterwarnings("ignore", module="pydicom")

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if not options.quiet:
            print(f"ctmasknet: {printable(as_flags(str(message), options))}", file=sys.stderr)

    warnings.showwarning = warn
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except CTMaskNetError as error:
        print(f"ctmasknet {options.command}: {printable(as_flags(str(error), options))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ctmasknet {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        sys.stderr.close()
        return 0
