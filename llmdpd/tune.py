"""The command `python -m llmdpd.tune`: see `llmdpd.cli.tune`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "tune")

if __name__ == "__main__":
    raise SystemExit(main())
