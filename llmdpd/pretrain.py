"""The command `python -m llmdpd.pretrain`: see `llmdpd.cli.pretrain`."""

from functools import partial

from llmdpd.__main__ import run

main = partial(run, "pretrain")

if __name__ == "__main__":
    raise SystemExit(main())
