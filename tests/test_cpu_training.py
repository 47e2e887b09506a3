"""Training through the CPU backend: blocks and the network against plain torch, compiled, over many steps."""

import copy
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stage_check import relative_error
from torch import Tensor, nn

import mbv2
from mbv2 import kernels
from mbv2.kernels import cpu_network, library
from mbv2.model import InvertedResidual, MobileNetV2

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"residual": (8, 8, 1, 6), "stride 2": (8, 16, 2, 6), "no expansion": (8, 16, 1, 1)}

pytestmark = [
    pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}"),
    # opcheck itself reads .grad of tensors that are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def trained_a_little(module: nn.Module) -> nn.Module:
    """Every BatchNorm with gamma, beta and running statistics of its own."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.5, 0.5)
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


def step(module: nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    """Output, all gradients and all buffers after one step of a copy of `module`."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with kernels.backend(backend):
        out = module(x)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **gradients, **dict(module.named_buffers())}


def assert_trains_as_plain_torch(module: nn.Module, x: Tensor, floor: float = 1e-5) -> None:
    """All results taken together: single elements flip at ReLU6's corners on either side."""
    mine, eager = step(module, x, "cpu"), step(module, x, "aten")
    exact = step(copy.deepcopy(module).double(), x.double(), "aten")
    assert mine.keys() == exact.keys()
    ours = theirs = 0.0
    for name, truth in exact.items():
        if not truth.is_floating_point():
            assert torch.equal(mine[name], truth), name
            continue
        assert mine[name].dtype == eager[name].dtype, name
        assert torch.isfinite(mine[name]).all(), name
        ours += relative_error(mine[name], truth) ** 2
        theirs += relative_error(eager[name], truth) ** 2
    assert ours**0.5 <= 1.3 * theirs**0.5 + floor, (ours**0.5, theirs**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_a_block_trains_as_plain_torch(kind: str, dtype: torch.dtype) -> None:
    block = trained_a_little(InvertedResidual(*SIZES[kind])).train().to(dtype)
    assert_trains_as_plain_torch(block, torch.randn(3, 8, 17, 15).to(dtype), {torch.bfloat16: 5e-2}.get(dtype, 1e-5))


@pytest.mark.parametrize("which", [1, 3, None])
def test_a_block_with_batch_norms_in_eval_mode_trains_as_plain_torch(which: int | None) -> None:
    block = trained_a_little(InvertedResidual(*SIZES["residual"])).train()
    if which is None:
        block.eval()
    else:
        block.conv[which].eval()
    assert_trains_as_plain_torch(block, torch.randn(2, 8, 9, 6))


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    block = trained_a_little(InvertedResidual(*SIZES["residual"])).train()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("0.0" not in name)
    x = torch.randn(2, 8, 9, 6)
    assert_trains_as_plain_torch(block, x)
    assert "dconv.0.0.weight" not in step(block, x, "cpu")


@pytest.mark.parametrize("size", [(2, 3, 64, 64), (3, 3, 37, 53), (2, 3, 33, 1)])
def test_the_network_trains_as_plain_torch(size: tuple[int, ...]) -> None:
    net = trained_a_little(MobileNetV2(10, 0.35, dropout=0.0)).to(memory_format=torch.channels_last)
    assert_trains_as_plain_torch(net.train(), torch.randn(size), 1e-4)


def test_inference_by_block_is_plain_torch_s() -> None:
    net = trained_a_little(MobileNetV2(10, 0.5)).eval()
    x = torch.randn(2, 3, 61, 45)
    with torch.no_grad():
        with kernels.backend("aten"):
            exact = copy.deepcopy(net).double()(x.double())
        with kernels.backend("cpu"):
            assert relative_error(net(x), exact) < 5e-6


def test_it_is_the_default_on_a_cpu_and_aten_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = InvertedResidual(*SIZES["residual"]).train(), torch.randn(2, 8, 4, 4)

    def ran() -> set[str]:
        before = dict(kernels.report()["calls"])
        block(x)
        return {call for call, times in kernels.report()["calls"].items() if times != before.get(call, 0)}

    assert ran() == {"inverted_residual_train/cpu"}
    monkeypatch.setenv("MBV2_BACKEND", "aten")
    assert ran() == {"inverted_residual/aten"}


def test_what_it_has_no_kernels_for_runs_in_plain_torch() -> None:
    block, x = InvertedResidual(*SIZES["residual"]).train().double(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert block(x).dtype == torch.float64
    with kernels.backend("cpu"), pytest.raises(kernels.BackendError, match="float64 has no kernels"):
        block(x)


def test_gradients_pass_gradcheck_in_float64() -> None:
    block = trained_a_little(InvertedResidual(2, 2, 1, 2)).train().double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_autocast_computes_in_bfloat16_and_keeps_parameters_single() -> None:
    block = trained_a_little(InvertedResidual(*SIZES["residual"])).train()
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), kernels.backend("cpu"):
        out = block(x)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    assert x.grad.dtype == torch.float32


def test_a_block_compiles_into_one_graph() -> None:
    block = trained_a_little(InvertedResidual(*SIZES["stride 2"])).train()
    x = torch.randn(2, 8, 9, 9)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    with kernels.backend("cpu"):
        mine, theirs = compiled(x), block(x)
        assert torch.equal(mine, theirs)
        mine.sum().backward()
        theirs.sum().backward()
    for a, b in zip(compiled.parameters(), block.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_training_operator_passes_opcheck_on_this_backend() -> None:
    block = InvertedResidual(*SIZES["residual"])
    x = torch.randn(2, 8, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    norm = (torch.rand(48, requires_grad=True), torch.rand(48, requires_grad=True), None, None, 1e-5)
    last = (torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True), None, None, 1e-5)
    w1, wd, w3 = (block.conv[0][0].weight, block.conv[1][0].weight, block.conv[2].weight)
    with kernels.backend("cpu"):
        torch.library.opcheck(
            library.inverted_residual_train.overload,
            (x, w1, *norm, wd, *norm, w3, *last, 1, True, ""),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_one_and_two_threads_train_to_the_same_bits() -> None:
    net = trained_a_little(MobileNetV2(10, 0.35, dropout=0.0)).train()
    x, before = torch.randn(3, 3, 48, 40), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            features = copy.deepcopy(net).features[:-1]
            results.append(step(features, x, "cpu"))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        # The picture's gradient, which training does not want, comes from plain torch.
        assert name == "dx" or torch.equal(value, results[1][name]), name


def test_the_memory_of_activations_is_used_again_and_can_be_released() -> None:
    block = InvertedResidual(16, 16, 1, 6).train()
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    state = torch.ops.mbv2.cpu_stage_memory
    with kernels.backend("cpu"):
        used = state()[0]
        held = block(x)
        assert state()[0] >= used + 2 * 4 * 4 * 96 * 64 * 64
        held.sum().backward()
        del held
        x.grad = None
        assert state()[0] == used
        peak = state()[1]
        block(x).sum().backward()
        assert state()[1] == peak
    torch.ops.mbv2.cpu_stage_release_memory()


def losses(
    net: nn.Module, backend: str, steps: int, x: Tensor, labels: Tensor, rate: float, count: int = 8
) -> list[float]:
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    found = []
    with kernels.backend(backend):
        for i in range(steps):
            batch = slice(count * i % len(x), count * i % len(x) + count)
            loss = nn.functional.cross_entropy(net(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


def distance(losses_of_a_run: list[float], exact: list[float]) -> float:
    pairs = zip(losses_of_a_run, exact, strict=True)
    return (sum((a / b - 1) ** 2 for a, b in pairs) / len(exact)) ** 0.5


def test_the_loss_of_a_short_run_follows_float64_as_plain_torch_s_does() -> None:
    torch.manual_seed(0)
    net = MobileNetV2(4, 0.35, dropout=0.0).train()
    x, labels = torch.randn(16, 3, 64, 64), torch.randint(4, (16,))
    mine = losses(net, "cpu", 20, x, labels, 0.002)
    theirs = losses(net, "aten", 20, x, labels, 0.002)
    exact = losses(copy.deepcopy(net).double(), "aten", 20, x.double(), labels, 0.002)
    assert sum(mine[-4:]) < 0.95 * sum(mine[:4])
    # Batch statistics of 8 small pictures make training chaotic: a value that rounding carries over a corner of ReLU6
    # changes the gradient by a percent, on either side and about as often, and distances double at every step.
    assert distance(mine[:3], exact[:3]) < 1.3 * distance(theirs[:3], exact[:3]) + 2e-2
    assert distance(mine, exact) < 2 * distance(theirs, exact) + 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_loss_of_200_steps_on_flowers_follows_eager_s_within_noise(shared_data: Path) -> None:
    from PIL import Image

    files = sorted(shared_data.glob("**/flower*/**/*.jpg"))
    folders = sorted({file.parent.name for file in files})
    if len(folders) < 2:
        pytest.skip(f"no folders of flowers in {shared_data}")
    files = files[:: max(1, len(files) // 320)][:320]
    pictures = [torch.frombuffer(bytearray(small(Image.open(file))), dtype=torch.uint8) for file in files]
    x = torch.stack(pictures).view(-1, 48, 48, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([folders.index(file.parent.name) for file in files])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    runs = {"cpu": [], "aten": [], "aten again": []}
    for seed in range(3):
        torch.manual_seed(seed)
        net = mbv2.MobileNetV2(len(folders), 0.35, dropout=0.0).train()
        for name, found in runs.items():
            if name == "aten again":
                nudge(net)
            found.append(losses(net, name.split()[0], 200, x[order], labels[order], 0.01, count=32))
    mine, theirs, again = (torch.tensor(found).view(3, 5, 40).mean(2) for found in runs.values())
    assert mine[:, -1].mean() < 0.5 * mine[:, 0].mean()
    torch.testing.assert_close(mine[:, 0].mean(), theirs[:, 0].mean(), rtol=0.03, atol=0)
    # Two runs of one seed part by rounding alone after some dozen steps: that is the noise.
    assert (mine - theirs).norm() < 2 * (again - theirs).norm()


def nudge(net: nn.Module) -> None:
    """Change all parameters by about as much as rounding does."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))


def small(picture: "Image.Image") -> bytes:  # noqa: F821
    """48 x 48 RGB."""
    return picture.convert("RGB").resize((48, 48)).tobytes()


@pytest.mark.slow
def test_the_kernels_run_clean_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = ROOT / "csrc" / "cpu"
    probe = subprocess.run(
        [compiler, "-xc++", "-", "-fsanitize=address,undefined", "-o", str(tmp_path / "probe")],
        input=b"int main() {}",
        capture_output=True,
    )
    if probe.returncode != 0:
        pytest.skip("this g++ has no sanitizers")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isa_flags = {"avx512": ["-mavx512f", "-mavx512dq", "-mfma"], "avx2": ["-mavx2", "-mfma"]}
    flags = ["-std=c++20", "-O1", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

    def build(source: Path) -> str:
        target = tmp_path / f"{source.stem}.o"
        own = isa_flags.get(source.stem.rpartition("_")[2], []) if x86 else []
        subprocess.run([compiler, *flags, *own, f"-I{folder}", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    # The choice of an instruction set needs the network's tables too.
    sources = [*folder.glob("train_*.cpp"), *folder.glob("kernels_*.cpp"), folder / "isa.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, [*sorted(sources), ROOT / "tests" / "cpu_training_sanitized.cpp"]))
    program = tmp_path / "sanitized"
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 24
