"""The command `python -m llmdpd.train`: see `llmdpd.cli.train`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "train")

if __name__ == "__main__":
    raise SystemExit(main())
