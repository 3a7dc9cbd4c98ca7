import pytest

from adamae_fast.report.figures import headline, series


def lines(*losses):
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_headline_of_a_run():
    metrics = [
        {
            "step": step,
            "loss": loss,
            "clips_per_second": 10.0 * step,
            "data_wait_share": 0.1 * step,
            "batches_ready": step,
        }
        for step, loss in enumerate((8.0, 100.0, 1.0, 2.0, 3.0, 4.0, 5.0), start=1)
    ]
    assert headline(metrics) == {
        "loss_first": 8.0,
        "loss_last": 3.0,
        "loss_fall": pytest.approx(1 - 3 / 8),
        "clips_per_second": pytest.approx(40),
        "data_wait_share": pytest.approx(0.4),
        "decode_seconds": None,
        "batches_ready": 4.0,
    }


@pytest.mark.parametrize(
    ("metrics", "first", "last"),
    [
        ([], None, None),
        (lines(None, 2.0), None, 2.0),
        (lines(float("nan"), 2.0), None, 2.0),
        (lines(float("inf"), 2.0), None, 2.0),
        (lines(0, 2.0), 0.0, 1.0),
        (lines(1.0, None, None, None, None, None), 1.0, None),
        ([{"step": 1}], None, None),
    ],
)
def test_there_is_no_fall_without_a_finite_first_and_last_loss(metrics, first, last):
    figures = headline(metrics)
    assert (figures["loss_first"], figures["loss_last"], figures["loss_fall"]) == (first, last, None)
    assert figures["clips_per_second"] is figures["data_wait_share"] is None


def test_means_leave_out_what_is_not_finite():
    assert headline(lines(4.0, None, 1.0, float("nan"), 1.0, 4.0))["loss_last"] == 2.0
    assert series(lines(4.0, None, float("inf"), 2), "loss") == ([1.0, 4.0], [4.0, 2.0])
