"""Which parameters have weight decay."""

from pathlib import Path

from llava.train.optim import build_optimizer
from tests.training import Assets, from_parts, gradients, net_and_dataset, recipe


def test_weight_decay_applies_to_matrices_newline_and_class_embedding(assets: Assets, tmp_path: Path) -> None:
    """An embedding table with two trained rows is exempt, because its other rows must not change."""
    asked = recipe(assets, tmp_path / "a", train=["projector", "decoder", "vision"], weight_decay=0.1)
    net, _ = net_and_dataset(asked)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for group in build_optimizer(net, asked).param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            exempt = "norm" in name or name.endswith("bias")
            assert group["weight_decay"] == (0 if exempt else 0.1), name
    values = from_parts(assets) | {"train": ["projector", "rows"], "start_end": True, "weight_decay": 0.5}
    asked = recipe(assets, tmp_path / "b", **values)
    net, dataset = net_and_dataset(asked)
    table = net.model.decoder.embed.weight
    before, adam = table.detach().clone(), build_optimizer(net, asked)
    gradients(net, dataset[0])
    adam.step()
    assert (table != before).any(1).nonzero()[:, 0].tolist() == net.trained_rows.tolist()
