"""What users do with a model goes on working after `mbv2.accelerate`, and what is changed later is computed right."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from drop_in_check import assert_same_step, fused_calls, one_thread, operators, pair, scrambled, step  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor

import mbv2
from mbv2.drop_in.swap import Accelerated

SETTING = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]


def small(**options: Any) -> nn.Module:
    return torchvision.models.mobilenet_v2(
        width_mult=0.35, num_classes=3, dropout=0.0, inverted_residual_setting=SETTING, **options
    )


STEPS = 6  # stem, four blocks, head


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


# --- state -------------------------------------------------------------------------------------------------------


def test_names_parameters_and_state_dict_are_untouched() -> None:
    model = small()
    parameters, modules, state = dict(model.named_parameters()), dict(model.named_modules()), model.state_dict()
    mbv2.accelerate(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert list(model.state_dict()) == list(state)
    fresh = small()
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)
    assert isinstance(model, torchvision.models.MobileNetV2)
    assert isinstance(model.features[1], torchvision.models.mobilenetv2.InvertedResidual)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickle_keeps_it_accelerated(protocol: int) -> None:
    ours, theirs = pair(small())
    again = pickle.loads(pickle.dumps(ours, protocol))
    assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
    with operators("plain"):
        assert_same_step(again, theirs, images(), STEPS)


def test_torch_save_of_the_whole_model() -> None:
    ours, theirs = pair(timm.create_model("mobilenetv2_035", num_classes=3))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with operators("plain"):
        assert_same_step(torch.load(file, weights_only=False), theirs, images(), 19)


def test_a_copy_is_independent_and_accelerated() -> None:
    ours, theirs = pair(small())
    again = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    with operators("plain"):
        assert_same_step(again, theirs, images(), STEPS)
    mbv2.restore(again)
    assert isinstance(ours.features[1], Accelerated)


def test_an_averaged_copy_follows_training() -> None:
    ours, theirs = pair(small(), train=True)
    averages = [torch.optim.swa_utils.AveragedModel(model, use_buffers=True) for model in (ours, theirs)]
    for model, average in zip((ours, theirs), averages, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with operators("operators"):
            for seed in range(2):
                torch.manual_seed(seed)
                model(images(4)).square().sum().backward()
                optimizer.step()
                average.update_parameters(model)
    torch.testing.assert_close(averages[0].state_dict(), averages[1].state_dict(), rtol=1e-7, atol=1e-9)


def test_modes_and_frozen_parts_are_read_at_every_call() -> None:
    ours, theirs = pair(small(), train=True)
    for model in (ours, theirs):
        model.features[:3].requires_grad_(False)
        model.features[2].eval()
        model.features[3].conv[1][1].eval()
        model.features[4].conv[0][1].momentum = None
    with operators("operators"):
        assert_same_step(ours, theirs, images(), STEPS)
        assert_same_step(ours.eval(), theirs.eval(), images(), STEPS)
        assert_same_step(ours.float().double(), theirs.float().double(), images(), STEPS)


# --- hooks -------------------------------------------------------------------------------------------------------


def test_hooks_on_a_block_fire() -> None:
    ours, _ = pair(small())
    seen: list[str] = []
    block = ours.features[2]
    block.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    block.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    block.register_full_backward_hook(lambda module, given, made: seen.append("backward"))
    with operators("operators"):
        step(ours, images())
    assert seen == ["before", "after", "backward"]


def test_a_block_with_hooks_inside_is_not_swapped_and_says_so() -> None:
    model = small()
    model.features[2].conv[1][0].register_forward_hook(lambda module, inputs, output: None)
    model.features[3].conv.register_forward_pre_hook(lambda module, inputs: None)
    reasons = {row.name: row.why for row in mbv2.accelerate(model).kept}
    assert reasons == {
        "features.2": "conv.1.0 has hooks, which only the original forward calls",
        "features.3": "conv is no plain Sequential, or has hooks",
    }


def test_a_hook_added_inside_later_fires_until_it_is_removed() -> None:
    ours, theirs = pair(small())
    shapes: list[torch.Size] = []
    handle = ours.features[2].conv[1][0].register_forward_hook(lambda module, inputs, out: shapes.append(out.shape))
    with operators("plain"):
        assert_same_step(ours, theirs, images(), STEPS - 1)
        assert len(shapes) == 1
        handle.remove()
        assert_same_step(ours, theirs, images(), STEPS)
    assert len(shapes) == 1


def test_hooks_on_all_modules_see_every_module() -> None:
    ours, theirs = pair(small())
    counts = []
    for model in (ours, theirs):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(type(module).__name__.removeprefix("Accelerated"))
        )
        try:
            with operators("plain"):
                model(images())
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1]


# --- changes after the swap --------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A convolution of somebody's own, as quantised and low-rank ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace_conv(block: nn.Module) -> None:
    old = block.conv[-3][0]
    conv = Doubled(old.in_channels, old.out_channels, 3, old.stride, 1, groups=old.groups, bias=False).double()
    conv.load_state_dict(old.state_dict())
    block.conv[-3][0] = conv


def add_bias(block: nn.Module) -> None:
    block.conv[-2].bias = nn.Parameter(torch.ones(block.conv[-2].out_channels, dtype=torch.float64))


def fuse_conv_and_norm(block: nn.Module) -> None:
    block.conv[-2] = fusion.fuse_conv_bn_eval(block.conv[-2], block.conv[-1])
    block.conv[-1] = nn.Identity()


def set_forward(block: nn.Module) -> None:
    conv = block.conv[-2]
    conv.forward = lambda x: 3 * nn.functional.conv2d(x, conv.weight)


def append(block: nn.Module) -> None:
    block.conv.append(nn.Tanh())


def pad_around(block: nn.Module) -> None:
    conv = block.conv[-3][0]
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


CHANGES: list[Callable[[nn.Module], Any]] = [
    replace_conv,
    add_bias,
    fuse_conv_and_norm,
    set_forward,
    append,
    lambda block: prune.l1_unstructured(block.conv[-3][0], "weight", 0.5),
    lambda block: parametrizations.weight_norm(block.conv[-2]),
    lambda block: parametrize.register_parametrization(block.conv[-2], "weight", nn.Tanh()),
    lambda block: block.conv[-3].__setitem__(2, nn.ReLU()),
    pad_around,
    lambda block: block.conv.__setitem__(-1, nn.GroupNorm(1, block.conv[-2].out_channels).double()),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_changed_later_is_computed_by_the_original_forward(change: Callable[[nn.Module], Any]) -> None:
    ours, theirs = pair(small())
    for model in (ours, theirs):
        change(model.features[2])
    with operators("plain"):
        assert_same_step(ours, theirs, images(), STEPS - 1)


class Scaled(Tensor):
    """A tensor type with arithmetic of its own, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.conv2d:
                return 2 * function(args[0], args[1].as_subclass(Tensor), *args[2:], **(kwargs or {}))
            made = function(*args, **(kwargs or {}))
        return made.as_subclass(cls) if function in (Tensor.detach, Tensor.requires_grad_) else made


def test_a_weight_of_another_tensor_type_keeps_its_arithmetic() -> None:
    ours, theirs = pair(small())
    for model in (ours, theirs):
        conv = model.features[2].conv[-2]
        conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Scaled), requires_grad=False)
    with operators("plain"), torch.no_grad():
        before = fused_calls()
        torch.testing.assert_close(ours(x := images()), theirs(x))
        assert fused_calls() - before == STEPS - 1


def test_wrong_types_raise_what_torch_raises() -> None:
    ours, theirs = pair(small())
    for call in (lambda model: model(images().float()), lambda model: model.features[1](images()[:, 0])):
        messages = []
        for model in (ours, theirs):
            with operators("plain"), pytest.raises(RuntimeError) as raised:
                call(model)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["mobilenetv2_035", "torchvision"])
def test_conversion_to_sync_batch_norm_afterwards(name: str) -> None:
    model = small() if name == "torchvision" else timm.create_model(name, num_classes=3)
    convert = timm.layers.convert_sync_batchnorm if name != "torchvision" else nn.SyncBatchNorm.convert_sync_batchnorm
    ours, theirs = pair(model)
    converted = convert(ours)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    with operators("operators"):
        assert_same_step(converted, theirs, images(), STEPS if name == "torchvision" else 19)


# --- torch's tools -----------------------------------------------------------------------------------------------


def test_checkpointed_segments_compute_the_same() -> None:
    ours, theirs = pair(small(), train=True)

    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        body = lambda x: torch.utils.checkpoint.checkpoint_sequential(  # noqa: E731
            model.features, 2, x, use_reentrant=False
        )
        return lambda x: model.classifier(body(x).mean((2, 3)))

    with operators("operators"):
        x = images()
        results = []
        for model in (ours, theirs):
            run(model)(x).square().sum().backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


def test_functional_call_and_vmap_over_an_ensemble() -> None:
    ours, theirs = pair(small())
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in ours.named_parameters()}
    x = images()
    with operators("operators"):
        outputs = [
            torch.func.vmap(lambda p, m=model: torch.func.functional_call(m, (p, dict(m.named_buffers())), (x,)))(
                stacked
            )
            for model in (ours, theirs)
        ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


def test_symbolic_trace_keeps_blocks_as_nodes_that_follow_the_mode() -> None:
    ours, theirs = pair(small(), train=True)
    traced = torch.fx.symbolic_trace(ours)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"][:3] == [f"features.{i}" for i in range(3)]
    with operators("plain"):
        assert_same_step(traced, theirs, images(), STEPS - 1)
        assert_same_step(traced.eval(), theirs.eval(), images(), STEPS - 1)
        assert_same_step(copy.deepcopy(traced), theirs, images(), STEPS - 1)


def test_feature_extractors_compute_the_same() -> None:
    ours, theirs = pair(small(), train=True)
    nodes = {"features.2": "low", "features.5": "high"}
    extractors = [create_feature_extractor(model, nodes) for model in (ours, theirs)]
    with operators("operators"):
        assert_same_step(*extractors, images(), STEPS - 1)
        assert_same_step(*(extractor.eval() for extractor in extractors), images(), STEPS - 1)
    getters = [torchvision.models._utils.IntermediateLayerGetter(m.features, nodes_of(nodes)) for m in (ours, theirs)]
    with operators("operators"):
        assert_same_step(*getters, images(), STEPS - 1)


def nodes_of(nodes: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("features."): key for name, key in nodes.items()}


def test_slices_of_the_features_compute_the_same() -> None:
    ours, theirs = pair(small())
    with operators("plain"):
        assert_same_step(ours.features[1:4], theirs.features[1:4], torch.randn(2, 16, 9, 8).double(), 3)


# torch says that TorchScript is deprecated, in three ways.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_gets_the_original_forward() -> None:
    ours, theirs = pair(small())
    x = images()
    with operators("operators"):
        scripts = torch.jit.script(ours), torch.jit.trace(ours, x)
    for script in scripts:
        assert "mbv2::" not in str(script.inlined_graph)
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert isinstance(ours.features[1], Accelerated)


def test_export_with_a_dynamic_batch() -> None:
    ours, theirs = pair(small())
    batch = torch.export.Dim("batch")
    with operators("operators"), torch.no_grad():
        program = torch.export.export(ours, (images(3),), dynamic_shapes=({0: batch},))
        assert sum("mbv2" in str(node.target) for node in program.graph.nodes) == STEPS
        torch.testing.assert_close(program.module()(x := images(5)), theirs(x), rtol=1e-9, atol=1e-9)
    plain = torch.export.export(ours, (images(3),), dynamic_shapes=({0: batch},))
    assert not any("mbv2" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_compiles_as_one_graph(train: bool) -> None:
    ours, theirs = pair(small(), train)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with operators("operators"):
        x = images()
        mine, expected = step(compiled, x), step(theirs, x)
    torch.testing.assert_close(mine["outputs"] + [mine["x"]], expected["outputs"] + [expected["x"]])
    torch.testing.assert_close(dict(ours.named_buffers()), expected["buffers"])


@pytest.mark.slow
def test_a_compiled_model_notices_the_swap() -> None:
    theirs = scrambled(small().double()).eval()
    ours = copy.deepcopy(theirs)
    compiled = torch.compile(ours, backend="aot_eager")
    x = images()
    with operators("operators"):
        torch.testing.assert_close(compiled(x), theirs(x))
        mbv2.accelerate(compiled)
        torch.testing.assert_close(compiled(x), theirs(x))
        mbv2.restore(compiled)
        torch.testing.assert_close(compiled(x), theirs(x))
