"""Networks with their own loss: in eval mode where they give one there, half awake where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import InputError, TaskOrientedLoss
from tests.ecosystem import boxes, fcos, retinanet, total


class Careless(nn.Module):
    """Gives its loss in any mode, with a dropout that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x, labels=None):
        logits = self.out(F.dropout(self.conv(x), 0.5, self.training))
        return logits if labels is None else F.cross_entropy(logits, labels)


class OnlyAwake(nn.Module):
    """Gives its loss in training mode only, as detectors do, and classes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, x, targets=None):
        logits = self.body(x)
        return F.cross_entropy(logits, targets) if self.training else logits.argmax(1)


class PerSample(Careless):
    def forward(self, x, labels):
        logits = self.out(F.dropout(self.conv(x), 0.5, self.training))
        return F.cross_entropy(logits, labels, reduction="none").mean((1, 2))


X = torch.rand(2, 1, 8, 8)
Y = torch.randint(0, 3, (2, 8, 8))


@pytest.mark.parametrize("build", [Careless, PerSample])
@pytest.mark.parametrize("training", [True, False])
def test_a_network_that_gives_its_loss_in_eval_mode_stays_there(build, training) -> None:
    net = build().train(training)
    loss = TaskOrientedLoss(net, None)
    value = loss(X, Y)
    torch.testing.assert_close(value, net.eval()(X, Y).mean())
    assert torch.equal(value, loss(X, Y)), "dropout is on"


def test_one_that_does_not_is_woken_with_its_layers_at_rest() -> None:
    net = OnlyAwake()
    loss = TaskOrientedLoss(net, None)
    x = X.clone().requires_grad_()
    value = loss(x, Y)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(copy.deepcopy(net).eval().body(X), Y))
    assert x.grad.any()
    assert torch.equal(loss.predict(X), net.eval()(X))
    assert torch.equal(value, loss(X, Y)), "looking at predictions changes its mode"


def test_looking_without_a_gradient_first_decides_the_same() -> None:
    for net in (Careless(), OnlyAwake()):
        loss = TaskOrientedLoss(net, None)
        with torch.no_grad():
            first = loss(X, Y)
        torch.testing.assert_close(loss(X.clone().requires_grad_(), Y).detach(), first)


def test_a_first_call_with_a_bad_label_decides_nothing() -> None:
    loss = TaskOrientedLoss(Careless(), None)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        loss(X, torch.full_like(Y, 7))
    assert torch.equal(loss(X, Y), loss(X, Y)), "the failure left it in training mode"


def test_the_deciding_look_leaves_the_random_state_to_the_loss_itself() -> None:
    class Samples(OnlyAwake):
        def forward(self, x, targets=None):
            noise = torch.rand(())
            return noise * F.mse_loss(x, targets) if self.training else noise.expand(5)

    target = torch.zeros_like(X)
    loss = TaskOrientedLoss(Samples(), None)
    torch.manual_seed(3)
    value = loss(X, target)
    torch.manual_seed(3)
    torch.testing.assert_close(value, torch.rand(()) * X.square().mean())


def test_an_answer_that_is_no_loss_names_output() -> None:
    class Answer(Careless):
        def forward(self, x, labels):
            return {"loss": super().forward(x, labels)}

    with pytest.raises(InputError, match=r"T returned a dict, not its loss; pick that with output=lambda answer: "):
        TaskOrientedLoss(Answer(), None)(X, Y)
    loss = TaskOrientedLoss(Answer(), None, output=lambda answer: answer["loss"])
    assert loss(X, Y).dim() == 0


def test_the_label_goes_to_the_parameter_of_its_name() -> None:
    class Audio(Careless):
        def forward(self, input_values, attention_mask=None, labels=None):
            assert attention_mask is None
            return super().forward(input_values, labels)

    net = Audio()
    torch.testing.assert_close(TaskOrientedLoss(net, None)(X, Y), net.eval()(X, labels=Y))


def test_a_network_that_cannot_predict_without_a_label_is_explained() -> None:
    with pytest.raises(InputError, match=r"T cannot predict without a label: .*labels.*; give its forward a default"):
        TaskOrientedLoss(PerSample(), None).predict(X)


# --- torchvision's detectors -----------------------------------------------------------------------------------------


def ssd() -> nn.Module:
    models = pytest.importorskip("torchvision.models.detection")
    net = models.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    net.transform.min_size, net.transform.max_size, net.transform.fixed_size = (64,), 64, (64, 64)
    return net


def keypoint_rcnn() -> nn.Module:
    models = pytest.importorskip("torchvision.models.detection")
    return models.keypointrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, num_keypoints=3, min_size=32, max_size=32
    )


def targets(keypoints: bool) -> list[dict[str, Tensor]]:
    found = boxes()
    for target in found:
        target["labels"] = torch.ones_like(target["labels"])
        if keypoints:
            target["keypoints"] = torch.tensor([[[9.0, 9.0, 1.0], [20.0, 20.0, 1.0], [30.0, 30.0, 1.0]]]).expand(
                len(target["boxes"]), -1, -1
            )
    return found


SLOW = pytest.param(keypoint_rcnn, marks=pytest.mark.slow)


@pytest.mark.parametrize("build", [retinanet, fcos, ssd, SLOW], ids=["retinanet", "fcos", "ssd", "keypoint_rcnn"])
def test_a_detector_guides_and_predicts(build) -> None:
    detector = build()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = TaskOrientedLoss(detector, None, preprocess=list, output=total)
    digest = loss.task_model.digest()
    loss(x, targets(build is keypoint_rcnn)).backward()
    assert x.grad.any() and x.grad.isfinite().all()
    found = loss.predict(x)
    expected = detector.eval()(list(x.detach()))
    assert [set(f) for f in found] == [set(e) for e in expected]
    for mine, his in zip(found, expected, strict=True):
        torch.testing.assert_close(mine["boxes"], his["boxes"])
    assert loss.task_model.digest() == digest
    assert loss(x, targets(build is keypoint_rcnn)).requires_grad, "predicting put it to sleep"


# --- Hugging Face transformers, built from small configurations ------------------------------------------------------

hub = pytest.mark.filterwarnings("ignore")  # transformers warns of its own parts


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=3, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.rand(2, 1, 16, 16), torch.tensor([0, 2]), None


def segformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_channels=1, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
        num_labels=3, drop_path_rate=0.5, classifier_dropout_prob=0.5,
    )  # fmt: skip
    label = torch.randint(0, 3, (2, 32, 32))
    return transformers.SegformerForSemanticSegmentation(config), torch.rand(2, 1, 32, 32), label, None


def wav2vec2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.9, hidden_dropout=0.5,
        mask_time_prob=0.5, mask_time_length=2,
    )  # fmt: skip
    label = torch.tensor([[1, 2, 3], [4, 1, -100]])
    return transformers.Wav2Vec2ForCTC(config), torch.randn(2, 1, 400), label, lambda x: x[:, 0]


@hub
@pytest.mark.parametrize("build", [vit, segformer, wav2vec2], ids=lambda build: build.__name__)
def test_a_transformer_guides_in_eval_mode(build) -> None:
    net, x, label, preprocess = build()
    net.train()
    loss = TaskOrientedLoss(net, None, preprocess=preprocess, output=lambda answer: answer.loss)
    digest = loss.task_model.digest()
    x, hand = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = loss(x, label)
    value.backward()
    expected = copy.deepcopy(net).eval()(hand if preprocess is None else preprocess(hand), labels=label).loss
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(x.grad, hand.grad)
    assert x.grad.any() and torch.equal(value, loss(x, label))
    assert loss.predict(x).logits.shape[0] == 2
    assert loss.task_model.digest() == digest and net.training
    label[1] = -100
    loss.missing = -100
    torch.testing.assert_close(loss(x, label), loss(x[:1], label[:1]))


@hub
def test_a_transformer_of_other_channels_names_preprocess() -> None:
    net, x, label, _ = vit()
    loss = TaskOrientedLoss(net, None, output=lambda answer: answer.loss)
    with pytest.raises(InputError, match=r"x_hat \(2, 3, 16, 16\) has 3 channels but the task network takes 1; pass"):
        loss(x.expand(-1, 3, -1, -1), label)
