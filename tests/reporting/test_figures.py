from __future__ import annotations

from llmdpd.reporting.figures import _panels


def test_of_many_tasks_curves_show_the_mean_and_the_losses_first() -> None:
    names = {"eval/seen_success", "loss/diffusion", "grad/policy", *(f"eval/t{n}-v3" for n in range(45))}
    titles = list(_panels(names))
    assert _panels(names)[titles[0]] == ["eval/seen_success"]
    assert titles[1:3] == ["loss/diffusion", "grad/policy"]
    assert len(titles) == 48
    few = {"eval/seen_success", "eval/a-v3", "loss/diffusion"}
    assert list(_panels(few).values()) == [["eval/seen_success", "eval/a-v3"], ["loss/diffusion"]]
