"""The command `python -m llmdpd.collect`: see `llmdpd.cli.collect`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "collect")

if __name__ == "__main__":
    raise SystemExit(main())
