"""Networks, losses and metrics of other libraries work as they come, and are left as they came."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Fidelity, Frozen, InputError, LossSum, TaskConsistencyLoss, TaskOrientedLoss


@dataclass
class Case:
    """A network and its task, and how to plug it in."""

    network: nn.Module
    criterion: Any
    x_hat: Tensor
    label: Any
    preprocess: Callable[[Tensor], Any] | None = None
    output: Callable[[Any], Any] | None = None

    def by_hand(self, x: Tensor) -> Any:
        """What the network makes of x, in eval mode, without the library."""
        network = copy.deepcopy(self.network).eval()
        prediction = network(x if self.preprocess is None else self.preprocess(x))
        return prediction if self.output is None else self.output(prediction)

    @property
    def options(self) -> dict[str, Any]:
        return {"preprocess": self.preprocess, "output": self.output}


@dataclass
class LeftAsFound:
    """Modes, flags, weights, statistics and gradients of a module, to compare with later."""

    module: nn.Module
    seen: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> LeftAsFound:
        self.seen = self._look()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            now = self._look()
            assert now["modes"] == self.seen["modes"], "a mode changed"
            assert now["flags"] == self.seen["flags"], "requires_grad changed"
            assert now["grads"] == self.seen["grads"], "a gradient appeared"
            assert now["digest"] == self.seen["digest"], "a weight or statistic moved"

    def _look(self) -> dict[str, Any]:
        frozen = Frozen(self.module)
        return {
            "modes": {name: m.training for name, m in self.module.named_modules()},
            "flags": {name: p.requires_grad for name, p in self.module.named_parameters()},
            "grads": {name: p.grad is None for name, p in self.module.named_parameters()},
            "digest": frozen.digest(),
        }


def rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, *x.shape[2:])


def warmed(network: nn.Module, example: Any) -> nn.Module:
    """In training mode and with running statistics that are not the defaults."""
    network.train()
    with torch.no_grad():
        network(example)
    return network


def image(*size: int) -> Tensor:
    return torch.rand(2, 1, *size)


def classes(*size: int, n: int = 3) -> Tensor:
    return torch.randint(0, n, (2, *size))


# --- networks and their tasks ----------------------------------------------------------------------------------------


def smp_with(loss: str, encoder: str = "mobilenet_v2") -> Callable[[], Case]:
    def build() -> Case:
        smp = pytest.importorskip("segmentation_models_pytorch")
        net = smp.Unet(
            encoder, encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8), in_channels=1, classes=3
        )
        x = image(32, 32)
        criterion = {
            "dice": lambda: smp.losses.DiceLoss("multiclass"),
            "focal": lambda: smp.losses.FocalLoss("multiclass"),
            "lovasz": lambda: smp.losses.LovaszLoss("multiclass"),
            "tversky": lambda: smp.losses.TverskyLoss("multiclass"),
        }[loss]()
        return Case(warmed(net, x), criterion, x, classes(32, 32))

    return build


def smp_classification_head() -> Case:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Linknet(
        "resnet18", encoder_weights=None, encoder_depth=3, in_channels=3, classes=1, aux_params={"classes": 3}
    )
    x = image(32, 32)
    return Case(
        warmed(net, rgb(x)),
        nn.CrossEntropyLoss(),
        x,
        classes(),
        preprocess=rgb,
        output=lambda mask_and_class: mask_and_class[1],
    )


def monai_unet(loss: str, dims: int) -> Callable[[], Case]:
    def build() -> Case:
        nets = pytest.importorskip("monai.networks.nets")
        losses = pytest.importorskip("monai.losses")
        size = (16,) * dims
        x = image(*size)
        net = nets.UNet(dims, 1, 3, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="batch", dropout=0.2)
        criterion = getattr(losses, loss)(softmax=True, to_onehot_y=True)
        return Case(warmed(net, x), criterion, x, classes(*size)[:, None])

    return build


def monai_deep_supervision(dims: int) -> Callable[[], Case]:
    def build() -> Case:
        nets = pytest.importorskip("monai.networks.nets")
        losses = pytest.importorskip("monai.losses")
        size = (32,) * dims
        x = image(*size)
        net = nets.BasicUNetPlusPlus(dims, 1, 3, features=(4, 4, 4, 4, 4, 4), deep_supervision=True, dropout=0.1)
        criterion = losses.DiceLoss(softmax=True, to_onehot_y=True)
        return Case(warmed(net, x), criterion, x, classes(*size)[:, None], output=lambda outputs: outputs[-1])

    return build


def monai_all_heads() -> Case:
    nets = pytest.importorskip("monai.networks.nets")
    losses = pytest.importorskip("monai.losses")
    x = image(32, 32)
    net = nets.BasicUNetPlusPlus(2, 1, 3, features=(4, 4, 4, 4, 4, 4), deep_supervision=True)
    criterion = losses.DeepSupervisionLoss(losses.DiceCELoss(softmax=True, to_onehot_y=True))
    return Case(warmed(net, x), criterion, x, classes(32, 32)[:, None])


class DictOfHeads(nn.Module):
    """A network that answers with a mapping, as torchvision's segmenters and many a research code do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.main = nn.Conv2d(4, 3, 1)
        self.aux = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        outputs = self.kind(list) if self.kind is defaultdict else self.kind()
        outputs["out"], outputs["aux"] = self.main(features), self.aux(features)
        return outputs


def main_and_aux(outputs: Any, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs["out"], label) + 0.4 * F.cross_entropy(outputs["aux"], label)


def mapping(kind: type, *, pick: bool) -> Callable[[], Case]:
    def build() -> Case:
        x = image(8, 8)
        net = warmed(DictOfHeads(kind), x)
        if pick:
            return Case(net, nn.CrossEntropyLoss(), x, classes(8, 8), output=lambda outputs: outputs["out"])
        return Case(net, main_and_aux, x, classes(8, 8))

    return build


def torchvision_segmenter() -> Case:
    models = pytest.importorskip("torchvision.models.segmentation")
    net = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    x = image(32, 32)
    return Case(
        warmed(net, rgb(x)), nn.CrossEntropyLoss(), x, classes(32, 32), preprocess=rgb, output=lambda maps: maps["out"]
    )


def torchvision_classifier(name: str) -> Callable[[], Case]:
    def build() -> Case:
        models = pytest.importorskip("torchvision.models")
        net = models.get_model(name, weights=None, num_classes=3)
        x = image(32, 32)
        criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
        return Case(warmed(net, rgb(x)), criterion, x, classes(), preprocess=rgb)

    return build


def timm_classifier(name: str) -> Callable[[], Case]:
    def build() -> Case:
        timm = pytest.importorskip("timm")
        size = {"img_size": 32} if "vit" in name else {}
        net = timm.create_model(name, pretrained=False, num_classes=3, drop_rate=0.3, drop_path_rate=0.2, **size)
        x = image(32, 32)
        return Case(warmed(net, rgb(x)), nn.CrossEntropyLoss(), x, classes(), preprocess=rgb)

    return build


class ModelOutput(OrderedDict):
    """Like transformers': an ordered mapping with its entries as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class HuggingFaceStyle(nn.Module):
    """Takes pixel values and, optionally, labels; answers with logits and, with labels, a loss, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 8, stride=8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ModelOutput:
        tokens = self.encoder(self.embed(pixel_values).flatten(2).transpose(1, 2))
        logits = self.head(tokens.mean(1))
        outputs = ModelOutput(logits=logits, hidden_states=(tokens,))
        if labels is not None:
            outputs["loss"] = F.cross_entropy(logits, labels)
        return outputs


def hugging_face_logits() -> Case:
    x = image(16, 16)
    return Case(warmed(HuggingFaceStyle(), x), nn.CrossEntropyLoss(), x, classes(), output=lambda out: out.logits)


CASES: dict[str, Callable[[], Case]] = {
    "smp-unet-dice": smp_with("dice"),
    "smp-unet-focal": smp_with("focal"),
    "smp-unet-lovasz": smp_with("lovasz"),
    "smp-timm-encoder-tversky": smp_with("tversky", encoder="tu-test_resnet"),
    "smp-tuple-with-class": smp_classification_head,
    "monai-unet-2d-dice": monai_unet("DiceLoss", 2),
    "monai-unet-3d-dice": monai_unet("DiceLoss", 3),
    "monai-unet-2d-dice-ce": monai_unet("DiceCELoss", 2),
    "monai-unet-3d-dice-ce": monai_unet("DiceCELoss", 3),
    "monai-deep-supervision-2d": monai_deep_supervision(2),
    "monai-deep-supervision-3d": monai_deep_supervision(3),
    "monai-deep-supervision-loss": monai_all_heads,
    "dict-picked": mapping(dict, pick=True),
    "ordered-dict-whole": mapping(OrderedDict, pick=False),
    "defaultdict-whole": mapping(defaultdict, pick=False),
    "torchvision-segmenter": torchvision_segmenter,
    "torchvision-mobilenet": torchvision_classifier("mobilenet_v3_small"),
    "torchvision-shufflenet": torchvision_classifier("shufflenet_v2_x0_5"),
    "torchvision-squeezenet": torchvision_classifier("squeezenet1_1"),
    "timm-resnet": timm_classifier("test_resnet"),
    "timm-vit": timm_classifier("test_vit"),
    "timm-convnext": timm_classifier("test_convnext"),
    "timm-efficientnet": timm_classifier("test_efficientnet"),
    "hugging-face-logits": hugging_face_logits,
}
every_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())


@every_case
def test_a_task_loss_is_the_criterion_of_the_network_in_eval_mode(build: Callable[[], Case]) -> None:
    case = build()
    x, label_before = case.x_hat.clone().requires_grad_(), case.label.clone()
    hand = case.x_hat.clone().requires_grad_()
    criterion = copy.deepcopy(case.criterion)
    expected = criterion(case.by_hand(hand), case.label)
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskOrientedLoss(case.network, case.criterion, **case.options)
        digest = term.task_model.digest()
        value = term(x, case.label)
        value.backward()
        assert term.task_model.digest() == digest
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert x.grad.any()
    assert torch.equal(x.detach(), case.x_hat), "x_hat was changed in place"
    assert torch.equal(case.label, label_before), "the label was changed in place"
    assert not list(term.parameters())
    assert not term.state_dict()


@pytest.mark.parametrize(
    "name",
    ["smp-unet-dice", "monai-unet-3d-dice", "monai-deep-supervision-2d", "torchvision-mobilenet", "timm-vit"],
)
def test_a_consistency_loss_is_the_distance_of_two_eval_outputs(name: str) -> None:
    case = CASES[name]()
    reference = torch.rand_like(case.x_hat)
    x, hand = (case.x_hat.clone().requires_grad_() for _ in range(2))
    expected = F.mse_loss(case.by_hand(hand), case.by_hand(reference).detach())
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskConsistencyLoss(case.network, nn.MSELoss(), **case.options)
        value = term(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert float(term(reference, reference)) == 0


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("torchvision-squeezenet", ["features.2", "features.5"]),
        ("timm-resnet", ["layer1", "layer3"]),
        ("smp-unet-dice", ["encoder", "decoder"]),
        ("monai-unet-3d-dice", ["model.0"]),
    ],
    ids=["torchvision-squeezenet", "timm-resnet", "smp-unet", "monai-unet-3d"],
)
def test_a_perceptual_loss_compares_the_named_layers_of_other_peoples_networks(name: str, layers: list[str]) -> None:
    case = CASES[name]()
    x, hand = (case.x_hat.clone().requires_grad_() for _ in range(2))
    reference = torch.rand_like(case.x_hat)
    first = (lambda f: f[-1] if isinstance(f, (list, tuple)) else f) if name.startswith("smp") else None

    def features(image: Tensor) -> list[Tensor]:
        network, seen = copy.deepcopy(case.network).eval(), []
        for layer in layers:
            network.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out))
        network(image if case.preprocess is None else case.preprocess(image))
        return seen if first is None else [first(f) for f in seen]

    pairs = zip(features(hand), features(reference), strict=True)
    expected = sum(F.l1_loss(a, b.detach()) for a, b in pairs)
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskConsistencyLoss(case.network, nn.L1Loss(), layers=layers, preprocess=case.preprocess, output=first)
        value = term(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["smp-unet-dice", "monai-unet-2d-dice-ce", "timm-vit"])
def test_a_copied_or_pickled_task_loss_says_the_same(name: str, how: str) -> None:
    case = CASES[name]()
    term = TaskOrientedLoss(case.network, case.criterion, preprocess=case.preprocess)
    again = copy.deepcopy(term) if how == "deepcopy" else pickle.loads(pickle.dumps(term))
    assert torch.equal(again(case.x_hat, case.label), term(case.x_hat, case.label))
    assert again.task_model.digest() == term.task_model.digest()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_torchscript_network_is_frozen_like_any_other() -> None:
    net = warmed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)), image(8, 8))
    scripted = torch.jit.script(net)
    x, hand = (torch.zeros(2, 1, 8, 8).requires_grad_() for _ in range(2))
    label = classes(4, 4)
    TaskOrientedLoss(net, nn.CrossEntropyLoss())(hand, label).backward()
    with LeftAsFound(scripted):
        term = TaskOrientedLoss(scripted, nn.CrossEntropyLoss())
        term(x, label).backward()
    torch.testing.assert_close(x.grad, hand.grad)
    assert not list(term.parameters())


# --- networks that compute their own loss ----------------------------------------------------------------------------


def faster_rcnn() -> nn.Module:
    models = pytest.importorskip("torchvision.models.detection")
    return models.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )


def retinanet() -> nn.Module:
    models = pytest.importorskip("torchvision.models.detection")
    return models.RetinaNet(_backbone(), 3, min_size=64, max_size=64, anchor_generator=_anchors(models, 16, 32))


def fcos() -> nn.Module:
    models = pytest.importorskip("torchvision.models.detection")
    return models.FCOS(_backbone(), 3, min_size=64, max_size=64, anchor_generator=_anchors(models, 16))


def _backbone() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    backbone = nn.Sequential(*block(3, 8), *block(8, 8), *block(8, 32), nn.Dropout(0.5))
    backbone.out_channels = 32
    return backbone


def _anchors(models: Any, *sizes: int) -> nn.Module:
    return models.anchor_utils.AnchorGenerator(sizes=(sizes,), aspect_ratios=((1.0,),))


def boxes() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[20.0, 16.0, 60.0, 60.0], [2.0, 2.0, 20.0, 30.0]]), "labels": torch.tensor([2, 1])},
    ]


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum(losses.values())


detectors = pytest.mark.parametrize("build", [faster_rcnn, retinanet, fcos], ids=lambda build: build.__name__)


@detectors
@pytest.mark.parametrize("training", [True, False], ids=["in-training-mode", "in-eval-mode"])
def test_a_detector_gives_its_training_loss_with_its_statistics_at_rest(
    build: Callable[[], nn.Module], training: bool
) -> None:
    detector = build().train(training)
    hand_net = copy.deepcopy(detector).train()
    for module in hand_net.modules():
        if not list(module.children()):
            module.eval()
    x, hand = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.manual_seed(5)  # detectors draw which proposals to learn from
    expected = total(hand_net(list(hand), boxes()))
    expected.backward()
    label = boxes()
    with LeftAsFound(detector):
        term = TaskOrientedLoss(detector, None, preprocess=list, output=total)
        digest = term.task_model.digest()
        torch.manual_seed(5)
        value = term(x, label)
        value.backward()
        assert term.task_model.digest() == digest, "batch statistics moved"
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert x.grad.any()
    assert not list(term.parameters())
    assert not any(m.training for m in term.task_model.network.modules() if isinstance(m, (nn.BatchNorm2d, nn.Dropout)))
    for found, asked in zip(label, boxes(), strict=True):
        assert torch.equal(found["boxes"], asked["boxes"]), "the boxes were changed in place"


def test_a_detector_stays_itself_in_a_parent_that_trains() -> None:
    term = TaskOrientedLoss(retinanet(), None, preprocess=list, output=total)
    parent = nn.ModuleDict({"loss": LossSum(task=term)})
    modes = [m.training for m in term.task_model.network.modules()]
    digest = term.task_model.digest()
    x = torch.rand(2, 3, 64, 64)
    values = [float(parent.train(mode)["loss"](x, label=boxes())) for mode in (True, False, True)]
    assert values == values[:1] * 3
    assert [m.training for m in term.task_model.network.modules()] == modes
    assert term.task_model.digest() == digest


def test_samples_without_boxes_are_left_out() -> None:
    term = TaskOrientedLoss(retinanet(), None, preprocess=list, output=total)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    value = term(x, [None, boxes()[1]])
    value.backward()
    torch.testing.assert_close(value, term(x[1:], boxes()[1:]))
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_a_grey_image_reaches_a_detector_by_preprocess() -> None:
    term = TaskOrientedLoss(fcos(), None, preprocess=lambda x: list(rgb(x)), output=total)
    x = torch.rand(2, 1, 64, 64, requires_grad=True)
    term(x, boxes()).backward()
    assert x.grad.any()


def test_a_shared_detector_switched_back_to_training_mode_is_refused() -> None:
    detector = retinanet()
    term = TaskOrientedLoss(detector, None, preprocess=list, output=total, copy=False)
    assert term(torch.rand(2, 3, 64, 64), boxes()).isfinite()
    detector.train()
    with pytest.raises(InputError, match=r"'backbone\.1'|'backbone\.0'|'transform'.* switched to training mode"):
        term(torch.rand(2, 3, 64, 64), boxes())


def test_a_network_with_its_own_loss_is_the_same_as_its_logits_under_that_loss() -> None:
    x, label = image(16, 16), classes()
    net = warmed(HuggingFaceStyle(), x)
    own = TaskOrientedLoss(net, None, output=lambda out: out.loss)
    logits = TaskOrientedLoss(net, nn.CrossEntropyLoss(), output=lambda out: out.logits)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    with LeftAsFound(net):
        own(a, label).backward()
        logits(b, label).backward()
    torch.testing.assert_close(own(x, label), logits(x, label))
    torch.testing.assert_close(a.grad, b.grad)


# --- image criteria --------------------------------------------------------------------------------------------------


def kornia_criteria() -> dict[str, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]]:
    return {
        "ssim-loss": lambda k: k.losses.SSIMLoss(5),
        "ms-ssim-loss": lambda k: k.losses.MS_SSIMLoss(sigmas=[0.5, 1.0]),
        "charbonnier": lambda k: k.losses.CharbonnierLoss(reduction="mean"),
        "psnr-loss": lambda k: k.losses.PSNRLoss(1.0),
        "psnr-metric": lambda k: lambda a, b: -k.metrics.psnr(a, b, 1.0),
        "ssim-metric": lambda k: lambda a, b: 1 - k.metrics.ssim(a, b, 5).mean(),
    }


@pytest.mark.parametrize("name", kornia_criteria())
def test_a_kornia_criterion_is_itself_as_a_term(name: str) -> None:
    criterion = kornia_criteria()[name](pytest.importorskip("kornia"))
    reference = torch.rand(2, 1, 16, 16)
    x, hand = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected = criterion(hand, reference)
    expected.backward()
    value = Fidelity(criterion)(x, reference)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


def test_a_kornia_loss_of_volumes_is_itself_as_a_term() -> None:
    kornia = pytest.importorskip("kornia")
    criterion = kornia.losses.SSIM3DLoss(3)
    x, reference = torch.rand(2, 1, 8, 8, 8), torch.rand(2, 1, 8, 8, 8)
    torch.testing.assert_close(Fidelity(criterion)(x, reference), criterion(x, reference))


def test_a_metric_that_returns_a_map_is_refused_with_the_mend() -> None:
    kornia = pytest.importorskip("kornia")
    term = Fidelity(lambda a, b: kornia.metrics.ssim(a, b, 5))
    x = torch.rand(2, 1, 16, 16)
    with pytest.raises(InputError, match=r"scalar or one value per sample, got shape \(2, 1, 16, 16\); reduce it"):
        term(x, x)


# --- LPIPS -----------------------------------------------------------------------------------------------------------

lpips_warnings = (
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning"),
)


def lpips_net(net: str = "squeeze") -> nn.Module:
    lpips = pytest.importorskip("lpips")
    metric = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    for lin in metric.lins:  # the trained ones are not negative
        for weight in lin.parameters():
            weight.data.abs_()
    return metric


def colour(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size) * 2 - 1


with_lpips = pytest.mark.parametrize("net", ["squeeze", "alex"])


def lpips_test(function: Callable[..., None]) -> Callable[..., None]:
    for mark in lpips_warnings:
        function = mark(function)
    return function


@lpips_test
@with_lpips
def test_lpips_is_itself_as_a_term(net: str) -> None:
    metric = lpips_net(net)
    reference = colour(64)
    x, hand = (colour(64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        hand.copy_(x)
    expected = metric.eval()(hand, reference).mean()
    expected.backward()
    metric.zero_grad(set_to_none=True)
    metric.train()
    with LeftAsFound(metric):
        value = Fidelity(metric)(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


@lpips_test
@with_lpips
def test_lpips_is_not_trained_not_saved_and_stays_in_eval_mode(net: str) -> None:
    metric = lpips_net(net)
    assert any(p.requires_grad for p in metric.parameters()), "else the test shows nothing"
    term = Fidelity(metric)
    parent = nn.ModuleDict({"loss": term}).train().requires_grad_(True)
    assert not list(parent.parameters())
    assert not parent.state_dict()
    held = term.criterion.network
    assert not any(m.training for m in held.modules())
    assert not any(p.requires_grad for p in held.parameters())
    x, reference = colour(), colour()
    assert torch.equal(term(x, reference), term(x, reference)), "dropout is active"


@lpips_test
@pytest.mark.parametrize("constant", [0.0, -1.0, 1.0])
def test_lpips_has_a_finite_gradient_and_its_own_value_where_features_vanish(constant: float) -> None:
    metric = lpips_net()
    first = next(m for m in metric.net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():  # an edge detector sees nothing in a constant image
        first.weight -= first.weight.mean((1, 2, 3), keepdim=True)
        first.weight -= first.weight.mean((2, 3), keepdim=True)
        first.bias.fill_(-1e-4)
    x = torch.full((1, 3, 32, 32), constant).requires_grad_()
    reference = colour()[:1]
    own = x.detach().clone().requires_grad_()
    own_value = metric.eval()(own, reference).mean()
    own_value.backward()
    assert not metric.net(own).relu1.any(), "else the test shows nothing"
    value = Fidelity(metric)(x, reference)
    value.backward()
    assert torch.equal(value.detach(), own_value.detach())
    assert x.grad.isfinite().all()


@lpips_test
def test_lpips_has_a_finite_gradient_where_the_squares_of_features_underflow() -> None:
    metric = lpips_net()
    first = next(m for m in metric.net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight *= 1e-30
        first.bias.zero_()
    x = colour().requires_grad_()
    Fidelity(metric)(x, colour()).backward()
    assert x.grad.isfinite().all()


@lpips_test
def test_lpips_refuses_one_channel_until_it_is_given_three() -> None:
    metric = lpips_net()
    x, reference = colour()[:, :1], colour()[:, :1]
    with pytest.raises(InputError, match=r"LPIPS needs 3 channels, got \(2, 1, 32, 32\); pass preprocess=lambda x"):
        Fidelity(metric)(x, reference)
    repeated = Fidelity(metric, preprocess=rgb)(x, reference)
    torch.testing.assert_close(repeated, metric.eval()(rgb(x), rgb(reference)).mean().detach())


@lpips_test
def test_lpips_refuses_images_from_zero_to_one_until_they_are_converted() -> None:
    metric = lpips_net()
    x, reference = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"the input spans \[.*\] but \[-1, 1\] is expected; convert it with prep"):
        Fidelity(metric)(x, reference)
    converted = Fidelity(metric, preprocess=lambda image: 2 * image - 1)(x, reference)
    torch.testing.assert_close(converted, metric.eval()(x, reference, normalize=True).mean().detach())


@lpips_test
def test_mending_lpips_leaves_the_callers_own_alone() -> None:
    metric = lpips_net()
    kind, x, reference = type(metric.net), colour(), colour()
    before = metric.eval()(x, reference)
    Fidelity(metric)
    assert type(metric.net) is kind
    assert torch.equal(metric(x, reference), before)


@lpips_test
def test_an_lpips_that_is_shared_instead_of_copied_works_and_is_checked() -> None:
    shared = Frozen(lpips_net(), copy=False)
    term, x = Fidelity(shared), colour()
    assert float(term(x, x)) == 0
    shared.network.train()
    with pytest.raises(InputError, match="was switched to training mode"):
        term(x, x)


# --- the defects of perceptual losses that this library exists to avoid ----------------------------------------------


def test_a_feature_extractor_handed_over_in_training_mode_gives_one_answer_and_stays_as_it_was() -> None:
    net = warmed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)),
        torch.rand(2, 3, 8, 8),
    )
    x, reference = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    with LeftAsFound(net):
        term = TaskConsistencyLoss(net, nn.MSELoss(), layers=["1", "4"])
        assert torch.equal(term(x, reference), term(x, reference))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_perceptual_loss_takes_any_rank_and_any_range(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    term = TaskConsistencyLoss(nn.Sequential(conv(1, 2, 3), nn.Tanh()), nn.MSELoss(), layers=["0"])
    x = -1000 + 3000 * torch.rand(1, 1, *(6,) * dims)
    assert term(x, torch.zeros_like(x)).isfinite()
    assert float(term(x, x)) == 0
