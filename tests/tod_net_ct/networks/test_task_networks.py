"""The task networks find as many classes as they are built for, and their file says how many."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("monai")

from examples.tod_net_ct.networks import TASK_NETWORKS, build, load_network, save_network


@pytest.mark.parametrize("name", TASK_NETWORKS)
@pytest.mark.parametrize("classes", [["liver"], ["liver", "tumour"]])
def test_scores_for_background_and_each_class(name, classes, tmp_path):
    network = build(name, 2, 1 + len(classes)).eval()
    save_network(tmp_path / "weights.pt", network, name, 2, class_names=classes)
    again = load_network(tmp_path / "weights.pt")
    image = torch.rand(1, 1, 16, 16, 16)
    scores = again(image)
    assert scores.shape == (1, 1 + len(classes), 16, 16, 16)
    assert torch.equal(scores, network(image))


def test_a_file_that_does_not_name_its_classes_has_one(tmp_path):
    save_network(tmp_path / "weights.pt", build("unet", 2), "unet", 2)
    assert load_network(tmp_path / "weights.pt")(torch.rand(1, 1, 16, 16, 16)).shape[1] == 2
