"""Networks, tasks and detectors of other libraries, as their own users build them."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Frozen


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
