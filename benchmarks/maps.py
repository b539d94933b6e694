"""``gradient_maps`` of four losses beside captum's ``Saliency``, one call per loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Target, agree, compare, without
from examples.tod_net_ct.networks import unet
from taskloss import AdversarialLoss, Fidelity, LossSum, TaskConsistencyLoss, TaskOrientedLoss, WassersteinCritic
from taskloss import gradient_maps as maps_of

SIZE, QUICK_SIZE = (16, 64, 64), (8, 16, 16)
TASK_WIDTH = 16


def run(options: Options) -> list[Case]:
    """One case: the maps of the adversarial, task, consistency and mean squared error terms."""
    torch.manual_seed(0)
    size = QUICK_SIZE if options.quick else SIZE
    to = {"device": options.device, "dtype": options.dtype}
    x_hat, reference = torch.rand(2, 2, 1, *size, **to)
    label = (reference[:, 0] > 0.5).long()
    segmenter = unet(TASK_WIDTH).eval().to(**to)
    loss = LossSum(
        adv=AdversarialLoss(WassersteinCritic(patch_size=size).to(**to)),
        task=TaskOrientedLoss(segmenter, nn.CrossEntropyLoss()),
        consistency=TaskConsistencyLoss(segmenter, nn.MSELoss()),
        mse=Fidelity(nn.MSELoss()),
    )
    case = Case(f"four maps, {' x '.join(map(str, x_hat.shape))}")

    def ours() -> dict[str, Tensor]:
        return maps_of(loss, x_hat, reference=reference, label=label).maps

    sides = {"taskloss": ours}
    try:
        from captum.attr import Saliency
    except ImportError:
        case.gaps.append(without("captum"))
        return [compare(case, sides, options)]

    targets = {"reference": (reference,), "label": (label,), None: ()}
    saliencies = {
        # One value for the batch, in a vector of one as captum wants it.
        name: Saliency(lambda x, term=term: term(x, *targets[term.reads]).reshape(1))
        for name, term in loss.terms.items()
    }

    def theirs() -> dict[str, Tensor]:
        return {
            name: saliency.attribute(x_hat.clone().requires_grad_(), abs=False) for name, saliency in saliencies.items()
        }

    sides["captum"] = theirs
    agree(case, "taskloss and captum", ours(), theirs(), 0.0)
    case.targets = [Target("seconds", "taskloss", "captum", at_most=1.0)]
    case.notes = [
        "captum is given the library's own terms, so that both run the same networks; what differs is the way around "
        "them, and a ratio within the noise of 1 is the most that can be had."
    ]
    return [compare(case, sides, options)]
