"""The command `python -m llmdpd.evaluate`: see `llmdpd.cli.evaluate`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "evaluate")

if __name__ == "__main__":
    raise SystemExit(main())
