"""The command `ctmasknet`: every subcommand calls one public function and prints what it says.

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
from ctmasknet.errors import CTMaskNetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 fine, 1 a check of `doctor` failed, 2 the user has something to mend."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.showwarning = _show_warning
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except CTMaskNetError as error:
        print(f"ctmasknet {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ctmasknet {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        sys.stderr.close()
        return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ctmasknet: {message}", file=sys.stderr)
