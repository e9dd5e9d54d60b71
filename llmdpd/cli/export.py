"""`llmdpd export RUN --task T --to cpp | onnx | torch`: a policy and its prompts, for machines without this package."""

from __future__ import annotations

from llmdpd.cli.common import command
from llmdpd.runs.export import ExportConfig, export_run
from llmdpd.utils.command_line import parse
from llmdpd.utils.progress import console


def _export(words: list[str]) -> None:
    out, checks = export_run(parse(ExportConfig, words, "llmdpd export"))
    files = [file for file in sorted(out.rglob("*")) if file.is_file()]
    for file in files:
        console.print(f"{file.stat().st_size / 1000:9.1f} kB  {file.relative_to(out)}", markup=False, highlight=False)
    for name, check in checks.items():
        said = f"{name}: within {check.difference:.1e} of the policy's actions; {check.microseconds:.0f} us an action"
        console.print(said, markup=False, highlight=False)
    console.print(f"export: {out}", markup=False, soft_wrap=True)


main = command(_export)
