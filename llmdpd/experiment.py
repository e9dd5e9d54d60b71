"""The command `python -m llmdpd.experiment`: see `llmdpd.cli.experiment`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "experiment")

if __name__ == "__main__":
    raise SystemExit(main())
