"""The command `python -m llmdpd.report`: see `llmdpd.cli.report`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "report")

if __name__ == "__main__":
    raise SystemExit(main())
