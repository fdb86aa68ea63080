"""Shared plotting helpers."""

from itertools import pairwise

from dlopt.results import drawing


def test_labels_at_the_ends_of_curves_do_not_overlap() -> None:
    figure = drawing.figure(9.6, 5.4)
    axes = figure.add_subplot()
    axes.set_ylim(0, 2)
    drawing.label_ends(axes, [(height, f"curve {i}", "red") for i, height in enumerate([0.0, 0.0, 0.02, 1.0, 2.0])])
    slots = [text.xyann[1] for text in axes.texts]
    assert all(above - below > 0.07 for above, below in pairwise(slots))
    assert [text.get_text() for text in axes.texts][:2] == ["curve 4", "curve 3"]  # from above
    assert slots[0] == 1 and slots[-1] == 0
