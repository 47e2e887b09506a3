"""timm's stem and head in `mbv2.accelerate`: swapped with the network's forward, and what that must not change.

What timm's and torchvision's own model tests ask beyond `test_accelerate_peers.py` is asked here as well: options of
the constructor, checkpointing, feature extraction, torch.fx, TorchScript of extractors.
"""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from drop_in_check import assert_same_step, fused_calls, one_thread, operators, pair, step  # noqa: F401
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import mbv2
from mbv2 import kernels
from mbv2.drop_in.swap import Accelerated
from mbv2.kernels import aten, dispatch

BLOCKS = 17


def network(**options: Any) -> nn.Module:
    return timm.create_model("mobilenetv2_035", **({} if "features_only" in options else {"num_classes": 3}), **options)


def images(n: int = 2, channels: int = 3, height: int = 33, width: int = 40) -> Tensor:
    return torch.randn(n, channels, height, width, dtype=torch.float64)


def network_rows(model: nn.Module) -> tuple[list[str], list[str]]:
    """What the report says of the network itself: kinds swapped, reasons for what was kept."""
    report = mbv2.accelerate(model)
    swapped = [row.kind for row in report.swapped if row.name == ""]
    return swapped, [row.why for row in report.kept if row.name == ""]


# --- options of the constructor ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "swapped", "kept"),
    [
        ({"in_chans": 1}, ["stem", "head with pooling"], []),
        (
            {"in_chans": 6},
            ["head with pooling"],
            ["of its stem, conv_stem is not a stem: stride 2 over at most 3 channels"],
        ),
        ({"global_pool": "fast"}, ["stem", "head with pooling"], []),
        ({"global_pool": "max"}, ["stem"], ["of its head, global_pool is no global average pooling"]),
        ({"global_pool": "catavgmax"}, ["stem"], ["of its head, global_pool is no global average pooling"]),
        ({"global_pool": "fastmax"}, ["stem"], ["of its head, global_pool is no global average pooling"]),
        ({"act_layer": "relu"}, [], ["bn1.act is a ReLU where the block has ReLU6"]),
    ],
)
def test_options_are_reported_and_compute_the_same(
    options: dict[str, Any], swapped: list[str], kept: list[str]
) -> None:
    if options.get("act_layer"):
        with pytest.warns(UserWarning, match="nothing in EfficientNet"):
            assert network_rows(network(**options)) == (swapped, kept)
        return
    ours, theirs = pair(network(**options), train=True)
    assert network_rows(ours) == (swapped, kept)
    with operators("operators"):
        assert_same_step(ours, theirs, images(channels=options.get("in_chans", 3)), BLOCKS + len(swapped))


def test_without_pooling_the_stem_is_fused_and_the_output_is_a_map() -> None:
    ours, theirs = pair(timm.create_model("mobilenetv2_035", num_classes=0, global_pool=""))
    with operators("operators"):
        assert_same_step(ours, theirs, images(), BLOCKS + 1)
    assert ours(images()).shape == (2, ours.num_features, 2, 2)


def test_a_smaller_output_stride_computes_the_same() -> None:
    ours, theirs = pair(network(output_stride=16), train=True)
    dilated = sum("is dilated by" in row.why for row in mbv2.accelerate(ours).kept)
    with operators("operators"):
        assert_same_step(ours, theirs, images(), BLOCKS + 2 - dilated)
    assert dilated == 3


def test_dropout_before_the_classifier_drops_what_timm_drops() -> None:
    ours, theirs = pair(network(drop_rate=0.5), train=True)
    x = images()
    results = []
    for model in (ours, theirs):
        with operators("plain"):
            torch.manual_seed(11)
            results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    with operators("plain"):
        assert_same_step(ours.eval(), theirs.eval(), x, BLOCKS + 2)


def test_another_classifier_and_pooling_are_read_at_the_next_call() -> None:
    ours, theirs = pair(network())
    for arguments, steps in (((0,), 2), ((0, ""), 1), ((5, "avg"), 2), ((4, "max"), 1)):
        torch.manual_seed(1)
        ours.reset_classifier(*arguments)
        torch.manual_seed(1)
        theirs.reset_classifier(*arguments)
        with operators("plain"):
            assert_same_step(ours.double(), theirs.double(), images(), BLOCKS + steps)


# --- checkpointing, hooks, methods -------------------------------------------------------------------------------


def test_checkpointed_blocks_are_recomputed_and_give_the_same_gradients() -> None:
    ours, theirs = pair(network(), train=True)
    for model in (ours, theirs):
        model.set_grad_checkpointing()
    before = fused_calls()
    with operators("plain"):
        mine, expected = step(ours, x := images()), step(theirs, x)
    assert fused_calls() - before == 2 * BLOCKS + 2
    # Recomputing moves the running statistics of both twice.
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["conv_stem", "bn1", "bn1.act", "conv_head", "bn2", "global_pool", "global_pool.pool"])
def test_a_hook_in_the_stem_or_head_fires_and_leaves_the_other_fused(name: str) -> None:
    ours, theirs = pair(network())
    seen: list[int] = []
    handle = ours.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(1))
    with operators("plain"):
        assert_same_step(ours, theirs, images(), BLOCKS + 1)
        assert seen == [1]
        handle.remove()
        assert_same_step(ours, theirs, images(), BLOCKS + 2)
    assert seen == [1]


def test_hooks_on_the_network_and_between_stem_and_head_fire() -> None:
    ours, theirs = pair(network())
    seen: list[str] = []
    for name in ("", "blocks", "blocks.3", "blocks.3.0", "classifier"):
        ours.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    with operators("plain"):
        assert_same_step(ours, theirs, images(), BLOCKS + 2)
    assert seen == ["blocks.3.0", "blocks.3", "blocks", "classifier", ""]


class DoubledHead(timm.models.EfficientNet):
    """A network of somebody's own with another head."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


def test_a_subclass_with_another_head_keeps_its_forward() -> None:
    model = network()
    model.__class__ = DoubledHead
    ours, theirs = pair(model)
    assert type(ours) is DoubledHead
    with operators("plain"):
        assert_same_step(ours, theirs, images(), BLOCKS)


def test_a_method_put_on_the_instance_is_called() -> None:
    ours, theirs = pair(network())
    for model in (ours, theirs):
        model.forward_features = lambda x, method=model.forward_features: 2 * method(x)
    with operators("plain"):
        assert_same_step(ours, theirs, images(), BLOCKS)


def test_the_unpooled_methods_compute_the_same() -> None:
    ours, theirs = pair(network())
    x = images()
    with operators("plain"):
        features = ours.forward_features(x)
        torch.testing.assert_close(features, theirs.forward_features(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.forward_head(features), theirs(x), rtol=1e-9, atol=1e-9)
        for options in ({}, {"indices": 2}, {"indices": [0, 3], "stop_early": True, "intermediates_only": True}):
            torch.testing.assert_close(
                ours.forward_intermediates(x, **options),
                theirs.forward_intermediates(x, **options),
                rtol=1e-9,
                atol=1e-9,
            )


def test_a_state_dict_goes_into_a_fresh_network_and_back() -> None:
    ours, theirs = pair(network())
    fresh = network().double().eval()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    again = network().double().eval()
    mbv2.accelerate(again)
    again.load_state_dict(fresh.state_dict(), strict=True)
    with operators("plain"):
        assert_same_step(again, theirs, images(), BLOCKS + 2)


# --- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "checkpointed"), [((0, 1, 2, 3, 4), False), ((0, 1, 2, 3, 4), True), ((2, 4), True), ((0,), False)]
)
def test_feature_maps_are_the_ones_asked_for(indices: tuple[int, ...], checkpointed: bool) -> None:
    ours, theirs = pair(network(features_only=True, out_indices=indices), train=True)
    steps = len([m for m in ours.modules() if isinstance(m, Accelerated)])
    for model in (ours, theirs):
        model.set_grad_checkpointing(checkpointed)
    before = fused_calls()
    with operators("plain"):
        mine, expected = step(ours, x := images()), step(theirs, x)
    assert len(mine["outputs"]) == len(indices)
    assert fused_calls() - before == (2 * steps - 1 if checkpointed else steps)
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def test_features_by_hooks_inside_the_blocks_compute_the_same() -> None:
    ours, theirs = pair(network(features_only=True, feature_location="expansion"))
    assert network_rows(ours) == ([], ["takes its features by hooks inside the blocks"])
    with operators("plain"):
        torch.testing.assert_close(ours(x := images()), theirs(x), rtol=1e-9, atol=1e-9)


def test_a_getter_of_features_says_that_the_stem_is_not_called_by_forward() -> None:
    ours, theirs = pair(network(features_only=True, feature_cls="getter"), train=True)
    report = mbv2.accelerate(ours)
    assert [(row.name, row.owner) for row in report.kept] == [("model", "EfficientNet")]
    assert "another method than its forward" in report.kept[0].why
    with operators("operators"):
        assert_same_step(ours, theirs, images(), BLOCKS)


def test_a_flattened_list_of_features_keeps_the_stem_apart() -> None:
    options = {"feature_cls": "list", "flatten_sequential": True}
    ours, theirs = pair(network(features_only=True, feature_cfg=options), train=True)
    assert [row.name for row in mbv2.accelerate(ours).kept] == ["conv_stem"]
    with operators("operators"):
        assert_same_step(ours, theirs, images(), BLOCKS)


# --- torch's tools -----------------------------------------------------------------------------------------------


def test_a_symbolic_trace_has_the_blocks_as_nodes() -> None:
    ours, theirs = pair(network())
    traced = torch.fx.symbolic_trace(ours)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert sum(name.startswith("blocks.") for name in called) == BLOCKS
    assert {"conv_stem", "conv_head", "classifier"} < set(called)
    with operators("plain"):
        torch.testing.assert_close(traced(x := images()), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_extractors_of_both_peers_give_gradients_and_can_be_scripted() -> None:
    setting = [[1, 16, 1, 1], [6, 24, 2, 2]]
    vision = torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=3, inverted_residual_setting=setting)
    for model, nodes in (
        (vision, ["features.0", "features.2", "features.4", "classifier.1"]),
        (network(), ["conv_stem", "blocks.1.1", "blocks.6.0", "conv_head", "classifier"]),
    ):
        ours, theirs = pair(model)
        extractors = [create_feature_extractor(model, nodes) for model in (ours, theirs)]
        x = images()
        with operators("operators"):
            mine, expected = (step(extractor, x) for extractor in extractors)
            # timm's BatchNorm is taken apart in the original's graph, which has no counter of batches then.
            for result in (mine, expected):
                del result["buffers"]
            torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(torch.jit.script(extractors[0])(x), extractors[1](x), rtol=1e-9, atol=1e-9)
        assert set(mine["gradients"]) == {name for name, _ in theirs.named_parameters()}


def test_export_with_a_dynamic_batch_holds_stem_and_head() -> None:
    ours, theirs = pair(network())
    batch = torch.export.Dim("batch")
    with operators("operators"), torch.no_grad():
        program = torch.export.export(ours, (images(3),), dynamic_shapes=({0: batch},))
        names = [str(node.target) for node in program.graph.nodes if "mbv2" in str(node.target)]
        assert (len(names), names[0], names[-1]) == (BLOCKS + 2, "mbv2.stem_folded.default", "mbv2.head_folded.default")
        torch.testing.assert_close(program.module()(x := images(5)), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("features_only", [False, True])
def test_compiles_as_one_graph(features_only: bool) -> None:
    ours, theirs = pair(network(features_only=features_only), train=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with operators("operators"):
        mine, expected = step(compiled, x := images()), step(theirs, x)
    torch.testing.assert_close(mine["outputs"] + [mine["x"]], expected["outputs"] + [expected["x"]])


# --- small inputs on CPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [(312, 1), (320, 3)])
def test_stem_and_head_of_small_inputs_run_on_torchs_modules_unless_a_backend_is_named(
    size: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MBV2_BACKEND", raising=False)
    monkeypatch.setitem(dispatch._backends, "cpu", dispatch.Backend(lambda device, dtype: None, lambda: aten))
    setting = [[1, 16, 2, 2]]
    theirs = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=3, inverted_residual_setting=setting).eval()
    ours = copy.deepcopy(theirs)
    assert len(mbv2.accelerate(ours).swapped) == 4
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before = fused_calls()
        torch.testing.assert_close(ours(x), expected := theirs(x), rtol=1e-4, atol=1e-5)
        assert fused_calls() - before == steps + 1
        with kernels.backend("cpu"):
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
        assert fused_calls() - before == steps + 1 + 4


def test_copies_are_accelerated_and_restored_alone() -> None:
    ours, theirs = pair(network())
    again = copy.deepcopy(ours)
    assert "" in mbv2.restore(again)
    assert type(again) is timm.models.EfficientNet
    with operators("plain"):
        assert_same_step(ours, theirs, images(), BLOCKS + 2)
        assert_same_step(again, theirs, images(), 0)
