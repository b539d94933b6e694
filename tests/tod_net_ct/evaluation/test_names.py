"""How names are printed."""

from examples.tod_net_ct.evaluation import title
from examples.tod_net_ct.run import Settings
from examples.tod_net_ct.training import parse


def test_titles_say_what_was_changed() -> None:
    assert title("tod_net@balance=false;clip=0.1") == "TOD-Net (balance=false, clip=0.1)"
    kind, settings = parse("tod_net@guides=unet+vnet;share_task=4", Settings())
    assert (kind, settings.guides, settings.share_task) == ("tod_net", ("unet", "vnet"), 4.0)
