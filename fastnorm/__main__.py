"""The command line: ``python -m fastnorm status | build | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastnorm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="what runs on this machine, and why not the kernels")
    build = commands.add_parser("build", help="compile the kernels now")
    build.add_argument("-v", "--verbose", action="store_true", help="show commands and output")
    build.add_argument("-f", "--force", action="store_true", help="compile even if compiled")
    build.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="demand or leave out the CUDA kernels (default: where a device is visible)",
    )
    build.add_argument("--clean", action="store_true", help="only remove what was compiled")
    commands.add_parser(
        "bench", help="time operators on this machine; bench --help tells more", add_help=False
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from fastnorm._bench import main as bench

        return bench(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    if options.command == "status":
        from fastnorm.status import status

        print(status())
        return 0
    from fastnorm import _build

    if options.clean:
        print(f"removed the compiled kernels in {_build.clean()}")
        return 0
    try:
        report = _build.build(verbose=options.verbose, force=options.force, cuda=options.cuda)
        with _build.use_backend("kernel"):
            _build.load()  # a library that compiles but does not load is a failed build
            if report.cuda is not None and torch.cuda.is_available():
                _build.load_cuda()
    except _build.KernelUnavailable as error:
        print(f"fastnorm: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
