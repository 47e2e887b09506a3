"""`mbv2.accelerate` on the models people have: what is matched, and that nothing computed changes."""

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from drop_in_check import assert_same_step, fused_calls, one_thread, operators, pair, scrambled, step  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mbv2
from mbv2.drop_in.accelerate import Report

WAYS = ["plain", "operators"]
TIMM = sorted(timm.list_models("mobilenetv2_*"))


def torchvision_v2(width: float = 0.35, **options) -> nn.Module:
    return torchvision.models.mobilenet_v2(width_mult=width, num_classes=5, dropout=0.0, **options)


def hugging_face(segmentation: bool = False, **options) -> nn.Module:
    settings = {"depth_multiplier": 0.35, "image_size": 64, "num_labels": 5, "classifier_dropout_prob": 0.0} | options
    config = transformers.MobileNetV2Config(**settings)
    if segmentation:
        return transformers.MobileNetV2ForSemanticSegmentation(config)
    return transformers.MobileNetV2ForImageClassification(config)


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]


def block_modules(inputs: int = 8, hidden: int = 16, outputs: int = 8, stride: int = 1) -> list[nn.Module]:
    return [
        *conv_bn_relu6(inputs, hidden, 1),
        *conv_bn_relu6(hidden, hidden, 3, stride, hidden),
        *conv_bn_relu6(hidden, outputs, 1)[:2],
    ]


class OwnResidual(nn.Module):
    """A block of somebody's own class, as in many repositories: the Sequential inside is what can be matched."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(*block_modules())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def kinds(report: Report) -> list[str]:
    return [row.kind for row in report.swapped]


# --- torchvision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0])
def test_torchvision_is_swapped_whole_at_every_width(width: float) -> None:
    with torch.device("meta"):
        model = torchvision_v2(width)
    report = mbv2.accelerate(model)
    assert report.kept == []
    assert kinds(report).count("stem") == kinds(report).count("head with pooling") == 1
    assert len(report.swapped) == 19
    assert report.swapped[1].channels.split(" -> ")[0] == str(model.features[0][0].out_channels)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("train", [True, False])
def test_torchvision_computes_the_same(way: str, train: bool) -> None:
    ours, theirs = pair(torchvision_v2(), train)
    with operators(way):
        assert_same_step(ours, theirs, torch.randn(3, 3, 65, 40, dtype=torch.float64), 19)


@pytest.mark.parametrize("way", WAYS)
def test_inference_without_gradients_computes_the_same(way: str) -> None:
    ours, theirs = pair(torchvision_v2(0.5))
    x = torch.randn(2, 3, 48, 33, dtype=torch.float64)
    with operators(way), torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.features(x), theirs.features(x), rtol=1e-9, atol=1e-9)


def test_a_detector_with_frozen_batch_norm_computes_the_same() -> None:
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    ours, theirs = pair(mobilenet_backbone(backbone_name="mobilenet_v2", weights=None, fpn=True, trainable_layers=2))
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(1, 3, 64, 64, dtype=torch.float64), 18)


def test_models_with_mobilenet_v3_say_so() -> None:
    with torch.device("meta"):
        lraspp = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
        ssdlite = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.warns(UserWarning, match="nothing in LRASPP is a MobileNetV2 block.*MobileNetV3"):
        report = mbv2.accelerate(lraspp)
    assert report.swapped == []
    assert "15 from backbone.1 to backbone.15 (InvertedResidual): is MobileNetV3's block" in str(report)
    report = mbv2.accelerate(ssdlite)
    assert [row.name for row in report.swapped] == [f"backbone.extra.{i}" for i in range(4)]
    assert {row.owner for row in report.kept if "MobileNetV3" in row.why} == {"InvertedResidual"}


def test_ssdlite_extra_blocks_compute_the_same() -> None:
    from torchvision.models.detection.ssdlite import _extra_block

    ours, theirs = pair(nn.Sequential(_extra_block(24, 16, nn.BatchNorm2d), nn.Conv2d(16, 4, 1)), train=True)
    assert type(ours[0]).__name__ == "AcceleratedSequential"
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 24, 9, 8, dtype=torch.float64), 1)


def test_the_quantizable_network_is_left_to_its_fuse_model() -> None:
    with torch.device("meta"):
        model = torchvision.models.quantization.mobilenet_v2(weights=None)
    with pytest.warns(UserWarning, match="quantisation"):
        report = mbv2.accelerate(model)
    assert report.swapped == []
    assert {type(m).__name__ for m in model.features} == {"Conv2dNormActivation", "QuantizableInvertedResidual"}


def test_a_deeplab_around_the_backbone_computes_the_same() -> None:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    backbone = torchvision.models._utils.IntermediateLayerGetter(torchvision_v2().features, {"17": "out"})
    ours, theirs = pair(DeepLabV3(backbone, DeepLabHead(112, 4)), train=False)
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 3, 64, 64, dtype=torch.float64), 18)


# --- timm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_every_timm_variant_is_swapped_whole(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    report = mbv2.accelerate(model)
    assert report.kept == []
    assert len(report.swapped) == sum(len(stage) for stage in model.blocks) + 2
    assert [(row.name, row.kind) for row in report.swapped[-2:]] == [("", "stem"), ("", "head with pooling")]


@pytest.mark.parametrize(
    ("name", "way", "train"),
    [
        ("mobilenetv2_035", "plain", True),
        ("mobilenetv2_035", "operators", False),
        ("mobilenetv2_110d", "operators", True),
    ],
)
def test_timm_computes_the_same(name: str, way: str, train: bool) -> None:
    ours, theirs = pair(timm.create_model(name, num_classes=5), train)
    steps = sum(len(stage) for stage in ours.blocks) + 2
    with operators(way):
        assert_same_step(ours, theirs, torch.randn(3, 3, 33, 64, dtype=torch.float64), steps)


def test_timm_features_only_computes_the_same() -> None:
    ours, theirs = pair(timm.create_model("mobilenetv2_035", features_only=True), train=True)
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 3, 64, 64, dtype=torch.float64), 18)


def test_timm_same_padding_and_5x5_kernels() -> None:
    ours, theirs = pair(timm.create_model("tf_efficientnet_lite0", num_classes=3), train=True)
    assert sum("5x5" in row.why for row in mbv2.accelerate(ours).kept) == 9
    for size in (64, 45):
        with operators("operators"):
            assert_same_step(ours, theirs, torch.randn(2, 3, size, size, dtype=torch.float64), 9)


def test_stochastic_depth_is_left_to_the_original_in_training_and_fused_in_evaluation() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=3, drop_path_rate=0.5).train()
    ours, theirs = pair(model, train=True)
    kept = [row for row in mbv2.accelerate(ours).kept if "drops branches" in row.why]
    assert len(kept) == 10
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with operators("plain"):
        before = fused_calls()
        torch.manual_seed(5)
        mine = ours(x)
        assert fused_calls() - before == 9
        torch.manual_seed(5)
        torch.testing.assert_close(mine, theirs(x), rtol=1e-9, atol=1e-9)
        assert_same_step(ours.eval(), theirs.eval(), x, 19)


def test_dilated_timm_stages_are_kept() -> None:
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100", features_only=True, output_stride=16)
    report = mbv2.accelerate(model)
    assert {row.why for row in report.kept if row.name.startswith("blocks")} == {"conv_dw is dilated by 2"}


# --- Hugging Face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 50)])
def test_hugging_face_with_tf_padding_computes_the_same(way: str, height: int, width: int) -> None:
    ours, theirs = pair(hugging_face(), train=True)
    with operators(way):
        assert_same_step(ours, theirs, torch.randn(2, 3, height, width, dtype=torch.float64), 18)


@pytest.mark.parametrize("options", [{"tf_padding": False}, {"first_layer_is_expansion": False}])
def test_hugging_face_options_compute_the_same(options: dict[str, bool]) -> None:
    ours, theirs = pair(hugging_face(**options), train=False)
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 3, 41, 48, dtype=torch.float64), 18)


def test_hugging_face_segmentation_keeps_its_dilated_blocks() -> None:
    ours, theirs = pair(hugging_face(segmentation=True, output_stride=8))
    report = mbv2.accelerate(ours)
    assert sum("is dilated by" in row.why for row in report.kept) == 10
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(1, 3, 64, 64, dtype=torch.float64), 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.booleans())
def test_a_turned_block_pads_as_tensorflow_does_at_any_size(height: int, width: int, expanded: bool) -> None:
    config = transformers.MobileNetV2Config(hidden_act="relu6", expand_ratio=2.0)
    from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2InvertedResidual, MobileNetV2Stem

    block = MobileNetV2InvertedResidual(config, 8, 8, stride=2) if expanded else MobileNetV2Stem(config, 3, 8, 8)
    ours, theirs = pair(block)
    with operators("plain"):
        assert_same_step(ours, theirs, torch.randn(1, 8 if expanded else 3, height, width).double(), 2 - expanded)


# --- any module --------------------------------------------------------------------------------------------------


def test_blocks_are_found_inside_a_flat_sequential() -> None:
    head = [*conv_bn_relu6(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2)]
    without_expansion = block_modules(8, 8)[3:]
    stem = conv_bn_relu6(3, 8, 3, 2)
    flat = nn.Sequential(*stem, nn.Sequential(*without_expansion), nn.Tanh(), *block_modules(), nn.Identity(), *head)
    ours, theirs = pair(flat, train=True)
    report = mbv2.accelerate(ours)
    assert [(row.name, row.kind) for row in report.swapped] == [
        ("3", "block"),
        ("", "stem"),
        ("", "block"),
        ("", "head with pooling"),
    ]
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 3, 16, 14, dtype=torch.float64), 4)


def test_somebody_elses_block_has_its_sequential_swapped() -> None:
    ours, theirs = pair(nn.Sequential(OwnResidual(), OwnResidual()), train=True)
    assert [row.name for row in mbv2.accelerate(ours).swapped] == ["0.conv", "1.conv"]
    with operators("operators"):
        assert_same_step(ours, theirs, torch.randn(2, 8, 6, 5, dtype=torch.float64), 2)


@pytest.mark.parametrize(
    ("position", "module", "why"),
    [
        (0, nn.Conv2d(8, 16, 1, bias=True), "has a bias"),
        (0, nn.Conv2d(8, 16, 1, groups=2, bias=False), "has 2 groups"),
        (3, nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, bias=False), "is dilated by 2"),
        (3, nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False), "is a 5x5 convolution, not 3x3"),
        (3, nn.Conv2d(16, 16, 3, groups=16, bias=False), r"has padding \(0, 0\)"),
        (3, nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=16, bias=False), "has padding mode reflect"),
        (3, nn.Conv2d(16, 32, 3, padding=1, groups=16, bias=False), "makes 32 channels of 16: not depthwise"),
        (3, nn.Conv2d(16, 16, 3, (2, 1), padding=1, groups=16, bias=False), "has stride 2x1"),
        (1, nn.GroupNorm(2, 16), "is a GroupNorm where the block has a BatchNorm"),
        (4, nn.InstanceNorm2d(16), "is an InstanceNorm2d where"),
        (2, nn.ReLU(), "is a ReLU where the block has ReLU6"),
        (5, nn.Hardtanh(0, 1), r"clamps to \[0, 1\]"),
        (6, nn.Conv2d(16, 8, 3, padding=1, bias=False), "is a 3x3 convolution, not 1x1"),
        (7, nn.Tanh(), "is a Tanh where the block has a BatchNorm"),
    ],
)
def test_what_a_block_may_not_have_is_named(position: int, module: nn.Module, why: str) -> None:
    block = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, expand_ratio=2)
    parts = block_modules()
    parts[position] = module
    block.conv = nn.Sequential(*parts)
    with pytest.warns(UserWarning, match=rf"conv\.{position} {why}"):
        report = mbv2.accelerate(block)
    assert report.swapped == []


def test_a_network_without_depthwise_convolutions_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="nothing in ResNet .* no depthwise convolution"):
        report = mbv2.accelerate(torchvision.models.resnet18())
    assert (report.swapped, report.kept) == ([], [])


def test_unknown_blocks_are_reported_by_their_forward() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_atto")
    with pytest.warns(UserWarning, match="ConvNeXtBlock.forward, is not known"):
        assert len(mbv2.accelerate(model).kept) == 12


def test_our_own_network_needs_no_swap_and_no_warning() -> None:
    with torch.device("meta"):
        model = mbv2.MobileNetV2()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = mbv2.accelerate(model)
    assert report.swapped == []
    assert {row.why for row in report.kept} == {"is mbv2's own and runs in one operator already"}


# --- the report, twice, and back ---------------------------------------------------------------------------------


def test_the_report_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Sequential(*block_modules()), nn.Sequential(*block_modules(8, 48, 24, 2)), OwnResidual())
    model[2].conv[5] = nn.ReLU()
    assert str(mbv2.accelerate(model)).splitlines() == [
        "Sequential: 2 swapped, 1 kept",
        "0  block  8 -> 16 -> 16 -> 8   stride 1  Sequential",
        "1  block  8 -> 48 -> 48 -> 24  stride 2  Sequential",
        "kept: 2 (OwnResidual): the ReLU is a ReLU where the block has ReLU6",
    ]


def test_accelerating_twice_changes_nothing_more() -> None:
    model = torchvision_v2()
    first = mbv2.accelerate(model)
    classes = [type(m) for m in model.modules()]
    assert mbv2.accelerate(model) == first
    assert [type(m) for m in model.modules()] == classes


def test_restore_gives_every_module_its_class_back() -> None:
    for model in (torchvision_v2(), timm.create_model("mobilenetv2_035"), hugging_face()):
        classes = [type(m) for m in model.modules()]
        state = [dict(m.__dict__) for m in model.modules()]
        report = mbv2.accelerate(model)
        assert sorted(mbv2.restore(model)) == sorted({row.name for row in report.swapped})
        assert [type(m) for m in model.modules()] == classes
        assert [dict(m.__dict__) for m in model.modules()] == state
        assert mbv2.restore(model) == []


# --- types and layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_it_is_as_accurate_as_the_original(way: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(torchvision_v2(), train=True, dtype=torch.float32)
    exact = scrambled(torchvision_v2().double()).train()
    exact.load_state_dict(theirs.state_dict())
    torch.manual_seed(5)
    x = torch.randn(16, 3, 64, 64)

    def errors(model: nn.Module) -> list[float]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(x)
        out.float().square().sum().backward()
        results = [out, model.features[9].conv[0][0].weight.grad, model.features[0][0].weight.grad]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, truth, strict=True)]

    out = exact(x.double())
    out.square().sum().backward()
    truth = [out.detach(), exact.features[9].conv[0][0].weight.grad, exact.features[0][0].weight.grad]
    with operators(way):
        mine = errors(ours)
    for ours_error, their_error in zip(mine, errors(theirs), strict=True):
        # One value that rounding moves across ReLU6's bounds moves a gradient this much.
        assert ours_error <= 1.3 * their_error + {torch.float32: 1e-2}.get(dtype, 1e-1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_either_memory_format_of_input_and_weights(layout: torch.memory_format) -> None:
    ours, theirs = pair(torchvision_v2(), train=True)
    for model in (ours, theirs):
        model.to(memory_format=layout)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64).to(memory_format=layout)
    with operators("operators"):
        assert_same_step(ours, theirs, x, 19)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_without_a_faster_backend_the_original_runs() -> None:
    ours, theirs = pair(torchvision_v2())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = fused_calls()
    assert torch.equal(ours(x), theirs(x))
    assert fused_calls() == before
