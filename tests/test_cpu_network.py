"""The compiled network on a CPU against the model in float64: every instruction set, odd shapes, special values."""

import copy
import json
import pickle
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mbv2
from mbv2 import doctor, evaluate, kernels, optimized
from mbv2.kernels import cpu_network

ROOT = Path(__file__).resolve().parents[1]
ISAS = [] if cpu_network.refusal() else cpu_network.usable_isas()

KERNELS = ROOT / "csrc" / "cpu"
NETWORK = [
    KERNELS / f"{name}.cpp"
    for name in (
        *("isa", "kernels_avx2", "kernels_avx512", "kernels_avx512bf16", "kernels_portable"),
        *("network_bfloat16", "network_float32", "plan"),
    )
]
# isa.cpp names every format's kernels.
INT8 = [
    KERNELS / f"{name}.cpp"
    for name in ("kernels_int8_avx2", "kernels_int8_avx512vnni", "kernels_int8_portable", "network_int8")
]
X86 = platform.machine().lower() in ("x86_64", "amd64")

pytestmark = pytest.mark.skipif(not ISAS, reason=f"{cpu_network.refusal()}")


@pytest.fixture(params=cpu_network.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in ISAS:
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setenv("MBV2_CPU_ISA", request.param)
    return request.param


def trained(width: float, classes: int = 10, seed: int = 0) -> mbv2.MobileNetV2:
    """A network whose BatchNorms have statistics, scales and shifts as training leaves them."""
    torch.manual_seed(seed)
    model = mbv2.MobileNetV2(classes, width)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


@torch.no_grad()
def check(model: mbv2.MobileNetV2, x: Tensor) -> None:
    """The packed network is as near the float64 result as float32 arithmetic gets."""
    with kernels.backend("aten"):
        wanted = copy.deepcopy(model).double()(x.double())
    got = mbv2.optimize_for_inference(model)(x)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    error = (got - wanted).abs().max() / wanted.abs().max()
    if error >= 5e-6:  # a few logits that all come out near zero are no measure: then plain torch's error is
        with kernels.backend("aten"):
            plain = (model(x) - wanted).abs().max() / wanted.abs().max()
        assert error < 4 * plain, f"relative error {error:.1e}, plain torch's {plain:.1e}"


@pytest.mark.parametrize("variant", mbv2.list_models())
def test_every_published_variant_is_the_model_in_float64(variant: str) -> None:
    width, resolution = variant.rsplit("_", 2)[1:]
    check(trained(float(width), 1001), torch.randn(1, 3, int(resolution), int(resolution)))


@pytest.mark.parametrize("size", [(1, 1), (2, 65), (64, 1), (37, 53), (160, 131)])
def test_every_instruction_set_is_the_model_in_float64(isa: str, size: tuple[int, int]) -> None:
    model = trained(0.75)
    assert mbv2.optimize_for_inference(model).isa == isa
    check(model, torch.randn(3, 3, *size))


# Without shrinking: a failing example is small enough to read, and every try packs a network.
@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    width=st.floats(0.1, 1.6),
    classes=st.integers(1, 70),
    batch=st.integers(1, 5),
    height=st.integers(1, 70),
    columns=st.integers(1, 70),
    isa=st.sampled_from(ISAS or ["portable"]),
    seed=st.integers(0, 99),
)
@example(width=0.25, classes=3, batch=2, height=19, columns=140, isa=(ISAS or ["portable"])[0], seed=0)  # stem shortcut
@example(width=1.06, classes=1, batch=5, height=22, columns=37, isa=(ISAS or ["portable"])[0], seed=7)  # logits near 0
def test_any_width_resolution_and_batch(
    width: float, classes: int, batch: int, height: int, columns: int, isa: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBV2_CPU_ISA", isa)
        check(trained(width, classes, seed), torch.randn(batch, 3, height, columns))


def test_the_input_may_lie_in_memory_in_any_way(isa: str) -> None:
    fast = mbv2.optimize_for_inference(trained(0.35))
    x = torch.randn(2, 3, 33, 47)
    wanted = fast(x)
    larger = torch.full((4, 5, 40, 60), float("nan"))
    larger[1:3, 1:4, 3:36, 7:54] = x
    wide = torch.full((2, 3, 33, 94), float("nan"))
    wide[..., ::2] = x
    shifted = torch.full((x.numel() + 1,), float("nan"))[1:].view(x.shape).copy_(x)
    for same in (
        x.to(memory_format=torch.channels_last),
        larger[1:3, 1:4, 3:36, 7:54],
        larger.to(memory_format=torch.channels_last)[1:3, 1:4, 3:36, 7:54],
        wide[..., ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        shifted,
    ):
        assert torch.equal(fast(same), wanted)
    assert torch.equal(fast(x[:1].expand(3, -1, -1, -1)), wanted[:1].expand(3, -1))


@pytest.mark.parametrize("size", [(20, 23), (150, 190)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_one_and_two_threads_and_repeated_calls_give_the_same_bits(isa: str, batch: int, size: tuple[int, int]) -> None:
    fast = mbv2.optimize_for_inference(trained(0.5))
    x = torch.randn(batch, 3, *size)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            results.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(torch.cat([fast(picture[None]) for picture in x]), results[0])


def test_calls_from_several_threads_do_not_disturb_one_another() -> None:
    fast = mbv2.optimize_for_inference(trained(0.35))
    pictures = [torch.randn(1, 3, 30 + 7 * i, 64) for i in range(8)]
    wanted = [fast(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for got, result in zip(pool.map(fast, pictures * 3), wanted * 3, strict=True):
            assert torch.equal(got, result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42])
def test_special_values_pass_as_in_torch(isa: str, value: float) -> None:
    model = trained(0.35)
    x = torch.randn(3, 3, 40, 40)
    x[1, 2, 17, 23] = value
    with torch.no_grad(), kernels.backend("aten"):
        wanted = model(x)
    got = mbv2.optimize_for_inference(model)(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_weights_that_are_not_finite_pass_as_in_torch(isa: str) -> None:
    model = trained(0.35)
    with torch.no_grad():
        model.features[3].conv[1][1].bias[5] = float("nan")
        wanted = model(torch.ones(1, 3, 32, 32))
    assert wanted.isnan().all()
    assert mbv2.optimize_for_inference(model)(torch.ones(1, 3, 32, 32)).isnan().all()


def test_a_batch_of_none_gives_no_logits() -> None:
    assert mbv2.optimize_for_inference(trained(0.35))(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_it_has_a_copy_of_the_weights_and_leaves_the_model_alone() -> None:
    model = trained(0.35)
    x = torch.randn(1, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    fast = mbv2.optimize_for_inference(model)
    before = fast(x)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast(x), before)


def test_batch_norms_without_scale_and_shift_are_folded_too() -> None:
    model = trained(0.35)
    norm = model.features[2].conv[0][1]
    norm.weight = norm.bias = None
    check(model, torch.randn(1, 3, 32, 32))


def test_pickled_and_copied_it_packs_itself_for_the_instruction_set_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 45, 45)
    monkeypatch.setenv("MBV2_CPU_ISA", ISAS[0])
    fast = mbv2.optimize_for_inference(trained(0.5))
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    stored = pickle.dumps(fast)
    assert len(stored) < 1.1 * 4 * sum(tensor.numel() for tensor in fast._folded)
    monkeypatch.setenv("MBV2_CPU_ISA", "portable")
    loaded = pickle.loads(stored)
    assert loaded.isa == "portable"
    torch.testing.assert_close(loaded(x), fast(x), rtol=1e-4, atol=1e-5)


def test_it_compiles_in_one_graph_and_passes_opcheck() -> None:
    fast = mbv2.optimize_for_inference(trained(0.35))
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = fast(x)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
        assert torch.equal(compiled(x[:1]), wanted[:1])
    torch.library.opcheck(
        torch.ops.mbv2.cpu_network.default,
        (x, fast._packed, fast._plan, fast.num_classes, fast.isa),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_it_cannot_do_is_said() -> None:
    model = trained(0.35)
    fast = mbv2.optimize_for_inference(model)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(RuntimeError, match="no gradients"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        assert not fast(x.clone().requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()
    with pytest.raises(RuntimeError, match="stays in float32"):
        fast.half()
    with pytest.raises(RuntimeError, match="float32"):
        fast(x.double())
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(RuntimeError, match="input"):
            fast(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        mbv2.optimize_for_inference(copy.deepcopy(model).train())
    with pytest.raises(ValueError, match=r"float\(\)"):
        mbv2.optimize_for_inference(copy.deepcopy(model).double())
    with pytest.raises(TypeError, match="Linear"):
        mbv2.optimize_for_inference(torch.nn.Linear(3, 3).eval())


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_CPU_ISA", "abacus")
    with pytest.raises(kernels.BackendError, match=r"abacus.*portable"):
        mbv2.optimize_for_inference(trained(0.35))


def test_a_network_packed_for_another_plan_or_instruction_set_is_refused() -> None:
    fast = mbv2.optimize_for_inference(trained(0.35))
    x = torch.randn(1, 3, 32, 32)
    run = torch.ops.mbv2.cpu_network
    with pytest.raises(RuntimeError, match="does not belong"):
        run(x, fast._packed[16:], fast._plan, 10, fast.isa)
    with pytest.raises(RuntimeError, match="classes"):
        run(x, fast._packed, fast._plan, 11, fast.isa)
    broken = fast._plan.clone()
    broken[7] += 8
    with pytest.raises((RuntimeError, ValueError), match="follow"):
        run(x, fast._packed, broken, 10, fast.isa)


def test_the_report_and_the_doctor_name_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.report()["cpu_network"] == cpu_network.isa()
    monkeypatch.setenv("MBV2_CPU_ISA", "portable")
    assert "portable" in doctor.examine()["kernels"]["extension"]
    monkeypatch.setenv("MBV2_CPU_ISA", "abacus")
    assert "not usable" in kernels.report()["cpu_network"]


def test_importing_the_package_does_not_load_the_compiled_module() -> None:
    code = "import sys, mbv2, mbv2.kernels; sys.exit('mbv2._C' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT).returncode == 0


def compiler_or_skip() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    return compiler


def build(sources: list[Path], flags: list[str], isa_flags: dict[str, list[str]], program: Path) -> None:
    """Compile `sources`, each with `flags` and its own of `isa_flags`, and link them to `program`."""
    command = [compiler_or_skip(), "-std=c++20", "-w", f"-I{KERNELS}", *flags]

    def compile_one(source: Path) -> str:
        target = program.parent / f"{source.stem}.o"
        own = isa_flags.get(source.stem, [])
        subprocess.run([*command, *own, "-c", str(source), "-o", str(target)], check=True, capture_output=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*command, *objects, "-pthread", "-o", str(program)], check=True)


def run_built(program: Path) -> int:
    """The first number that `program` prints, if it succeeds."""
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_kernels_run_clean_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    probe = subprocess.run(
        [compiler_or_skip(), "-xc++", "-", "-fsanitize=address,undefined", "-o", str(tmp_path / "probe")],
        input=b"int main() {}",
        capture_output=True,
    )
    if probe.returncode != 0:
        pytest.skip("this g++ has no sanitizers")
    isa_flags = {
        "kernels_avx512": ["-mavx512f", "-mavx512dq", "-mfma"],
        "kernels_avx512bf16": ["-mavx512f", "-mavx512dq", "-mavx512bf16", "-mfma"],
        "kernels_avx2": ["-mavx2", "-mfma"],
        "kernels_int8_avx2": ["-mavx2", "-mfma"],
        "kernels_int8_avx512vnni": [
            *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma")
        ],
    }
    flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build([*NETWORK, *INT8, ROOT / "tests" / "cpu_network_sanitized.cpp"], flags, isa_flags if X86 else {}, program)
    isas = {format: len(cpu_network.usable_isas(format)) for format in cpu_network.FORMATS}
    assert run_built(program) == 63 * (isas["float32"] + isas["bfloat16"]) + 117 * isas["int8"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_avx512_kernels_through_simde_are_the_portable_ones_on_any_machine(tmp_path: Path) -> None:
    probe = [compiler_or_skip(), "-xc++", "-E", "-"]
    if subprocess.run(probe, input=b"#include <simde/x86/avx512.h>\n", capture_output=True).returncode != 0:
        pytest.skip("no SIMDe headers (Debian: apt-get install libsimde-dev)")
    native = ["-mavx2", "-mfma"] if "avx2" in ISAS else []
    program = tmp_path / "simde"
    sources = [source for source in NETWORK if source.stem not in ("isa", "kernels_avx2")]
    isa_flags = {name: ["-DMBV2_SIMDE", *native] for name in ("kernels_avx512", "kernels_avx512bf16")}
    build([*sources, ROOT / "tests" / "cpu_network_simde.cpp"], ["-O1"], isa_flags, program)
    assert run_built(program) == 84


def test_eval_and_infer_run_it_on_a_cpu_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBV2_BACKEND", raising=False)
    model, x, cpu = trained(0.35), torch.randn(2, 3, 32, 32), torch.device("cpu")
    with torch.no_grad():
        wanted = model(x)
        fast, runs = optimized.fastest(model, cpu)
        assert isinstance(fast, optimized.OptimizedMobileNetV2)
        assert cpu_network.isa() in runs
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(fast.real_logits(wanted), model.real_logits(wanted))
        assert torch.equal(fast.targets(torch.arange(3)), model.targets(torch.arange(3)))
        assert fast.num_real_classes == model.num_real_classes
        assert optimized.fastest(model, cpu, torch.float16)[0] is model
        monkeypatch.setenv("MBV2_BACKEND", "aten")
        plain, runs = optimized.fastest(model, cpu)
        assert plain is model
        assert "MBV2_BACKEND=aten" in runs
    monkeypatch.setenv("MBV2_BACKEND", "auto")
    monkeypatch.setenv("MBV2_CPU_ISA", "abacus")
    with pytest.raises(mbv2.UserError, match="abacus"):
        optimized.fastest(model, cpu)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("nips17_ccby_299", 700), ("ilsvrc_val_227", 1000)])
def test_on_real_pictures_it_names_the_classes_that_plain_torch_names(
    shared_data: Path, name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"
    found = []
    for backend in ("auto", "aten"):
        monkeypatch.setenv("MBV2_BACKEND", backend)
        result = tmp_path / f"{backend}.json"
        pictures = shared_data / "eval" / name
        arguments = ["--pretrained", weights, "--data_url", pictures, "--json", result, "--num_parallel_workers", 0]
        assert evaluate.main([str(argument) for argument in arguments]) == 0
        found.append(json.loads(result.read_text()))
    fast, plain = found
    assert "compiled network" in fast["runs"]
    assert plain["runs"].endswith("MBV2_BACKEND=aten")
    assert fast["count"] == plain["count"] == count
    # A logit that is a tie to the last bit may fall either way.
    assert abs(fast["top1_right"] - plain["top1_right"]) <= 1
    assert abs(fast["top5_right"] - plain["top5_right"]) <= 1
    assert abs(fast["loss"] - plain["loss"]) < 1e-4
