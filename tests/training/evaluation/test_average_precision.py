"""Average precision against cases that were computed by hand."""

import numpy as np
import pytest

from stmae.training.evaluation.average_precision import iou, mean_average_precision

A, B, C = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.5, 0.4, 0.9]
SHIFTED = [0.1, 0.0, 0.5, 0.4]  # with A: 0.12 of 0.2, so 0.6
FAR = [0.2, 0.0, 0.6, 0.4]  # with A: 0.08 of 0.24, so 1/3


def one_class(truth, detected):
    """Average precision where every box is of the one class; detected: {frame: [(box, score)]}."""
    boxes = {frame: (np.array(found), ((0,),) * len(found)) for frame, found in truth.items()}
    scored = {
        frame: (np.array([box for box, _ in found]).reshape(-1, 4), np.array([score for _, score in found]).reshape(-1, 1))
        for frame, found in detected.items()
    }
    return mean_average_precision(boxes, scored, 1)[0]


def test_intersection_over_union():
    found = iou([A, B, [0.3, 0.3, 0.3, 0.3]], [A, SHIFTED, FAR, [0.3, 0.3, 0.3, 0.3]])
    np.testing.assert_allclose(found, [[1, 0.6, 1 / 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]], atol=1e-12)
    assert iou(np.zeros((0, 4)), [A]).shape == (0, 1)


@pytest.mark.parametrize(
    "truth, detected, expected",
    [
        ({1: [A, B]}, {1: [(A, 0.9), (B, 0.8)]}, 1.0),
        ({1: [A, B]}, {1: [(A, 0.9)]}, 0.5),  # recall ends at 1/2
        ({1: [A, B]}, {1: [(C, 0.9), (A, 0.8), (B, 0.7)]}, 2 / 3),  # precisions 0, 1/2, 2/3: the highest beyond is 2/3
        ({1: [A, B]}, {1: [(A, 0.9), (C, 0.8), (B, 0.7)]}, (1 + 2 / 3) / 2),
        ({1: [A]}, {1: [(SHIFTED, 0.9)]}, 1.0),  # 0.6 overlap
        ({1: [A]}, {1: [(FAR, 0.9)]}, 0.0),  # 1/3
        ({1: [A]}, {1: [(A, 0.9), (SHIFTED, 0.95)]}, 1.0),  # the higher score takes the box, the other is wrong, after it
        ({1: [A, B]}, {1: [(SHIFTED, 0.95), (A, 0.9), (B, 0.8)]}, (1 + 2 / 3) / 2),  # twice the same box counts once
        ({1: [A], 2: [A]}, {1: [(A, 0.2)], 2: [(B, 0.9), (A, 0.1)]}, 2 / 3),  # scores are compared over all frames
        ({1: [A]}, {1: [(A, 0.5)], 7: [(A, 0.9)]}, 0.5),  # a frame without annotations
        ({1: [A]}, {}, 0.0),
        ({1: [A]}, {1: []}, 0.0),
    ],
)
def test_cases_computed_by_hand(truth, detected, expected):
    assert one_class(truth, detected) == pytest.approx(expected)


def test_a_box_that_a_better_one_took_is_not_passed_on_to_the_next():
    """Where COCO would give the second detection the box that is still free: its best box is taken, so it is wrong."""
    near = [0.02, 0.0, 0.42, 0.4]
    first, second = [0.0, 0.0, 0.4, 0.4], [0.005, 0.0, 0.405, 0.4]  # both overlap the first box most
    assert one_class({1: [A, near]}, {1: [(first, 0.9), (second, 0.8)]}) == pytest.approx(0.5)


def test_boxes_with_several_actions_and_classes_without_boxes():
    truth = {"v": (np.array([A, B]), ((0, 2), (2,)))}
    scores = np.array([[0.9, 0.9, 0.1], [0.8, 0.1, 0.7]])
    found = mean_average_precision(truth, {"v": (np.array([A, B]), scores)}, 4)
    assert found == {0: 1.0, 2: 1.0}  # nobody does 1 or 3
    worse = mean_average_precision(truth, {"v": (np.array([A, B]), scores[::-1])}, 4)
    assert worse == {0: 0.5, 2: 1.0}
