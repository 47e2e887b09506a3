"""`python -m bench`: one clear sentence for what cannot be done, and pictures and tables again from the JSON."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from test_bench_schema import result

from bench import __main__ as cli
from bench import schema

RATIO = {"faster": 2.0, "faster_low": 1.8, "faster_high": 2.1, "median_ms": 3.0, "cpu_median_ms": 3.0}
SPEED = {"batch": 1, "threads": 1, "images_per_s": 300.0, **RATIO}
LOADER = {"workers": 2, "images_per_s": 100.0, "p25_images_per_s": 90.0, "p75_images_per_s": 110.0}
LOADER |= {"cpu_ms_per_image": 4.0, "less_cpu": 1.0, "less_cpu_low": 0.9, "less_cpu_high": 1.1}
LATENCY = {"source": "latency", "threads": 1, "cpu_median_ms": 2.0, "cpu_p25_ms": 1.9, "cpu_p75_ms": 2.2}
ODD = {"eager_over_ours": 4.0, "eager_over_ours_low": 3.5, "eager_over_ours_high": 4.5}
RESULTS = {
    "kernels": result(
        "kernels",
        [
            {"operator": "stem", "pass": which, "backend": backend, "gflop_per_s": 5.0, **RATIO}
            for which in ("forward", "backward")
            for backend in ("aten", "triton")
        ],
    ),
    "model": result(
        "model", [{"model": "1.0_224", "runner": name, **SPEED} for name in ("eager NCHW", "mbv2")], device="cpu"
    ),
    "train": result(
        "train", [{"model": "1.0_224", "runner": n, **SPEED} for n in ("torchvision eager", "mbv2 aten")], device="cuda"
    ),
    "loader": result(
        "loader",
        [{"loader": name, **LOADER} for name in ("ImageFolder (PIL)", "mbv2 torch")],
        pictures=9,
        data="x",
        resolution=64,
    ),
    "memory": result(
        "memory",
        [{"runner": "torchvision eager", "saved_mb": 36.9, "peak_mb": 700}, {"runner": "mbv2", "saved_mb": 14.5}],
        model="1.0_224",
        saved_dtype="bfloat16",
        step_dtype="float32",
        step_batch=8,
    ),
    "cpu": result(
        "cpu",
        [
            {"model": m, "runner": n, "over_ours": 1.5, "over_ours_low": 1.4, "over_ours_high": 1.7, **SPEED}
            for m in ("1.0_224", "0.35_96")
            for n in ("mbv2", "eager NCHW", "LiteRT")
        ],
    ),
    "cpu_parts": result(
        "cpu_parts",
        [
            {"model": "1.0_224", "batch": 1, "part": part, "least_ms": 0.5, "peak_percent": 90.0}
            for part in ("block 1", "head", "the whole run")
        ],
        peak_gflops=100.0,
    ),
    "cpu_scaling": result(
        "cpu_scaling",
        [
            *({"group": "batch", "shape": f"{n} x 224 x 224", "per_image_ms": 7.0} for n in (1, 2, 4)),
            *({"group": "size", "shape": f"1 x {n} x {n}", "per_kilopixel_us": 150.0} for n in (96, 224)),
            {"group": "odd shapes", "shape": "3 x 37 x 53", "width": 1.0, **ODD},
        ],
    ),
    "cpu_blocks": result(
        "cpu_blocks",
        [
            {"shape": f"{n} x 8 x 7 x 7", "outputs": 8, "stride": 1, "cpu_min_us": 400.0, "error": 1e-6, **RATIO}
            for n in (1, 2)
        ],
    ),
    "cpu_training": result(
        "cpu_training",
        [
            {"model": "1.0_224", "runner": n, "baseline": "eager channels_last", **SPEED}
            for n in ("mbv2", "eager channels_last")
        ],
        device="cpu",
    ),
    "cpu_int8": result(
        "cpu_int8",
        [
            {"model": "1.0_224", "runner": n, "baseline": "mbv2 float32", "error": 0.02, **SPEED}
            for n in ("mbv2", "mbv2 float32")
        ],
        device="cpu",
    ),
    "cold": result(
        "cold",
        [
            {"runner": name, "cpu_ms": 150.0, "cpu_min_ms": 140.0, "cpu_max_ms": 170.0, "wall_ms": 160.0}
            for name in ("mbv2 optimized", "torchvision eager")
        ],
    ),
    "accuracy": result(
        "accuracy",
        [
            {"model": "mobilenet_v2_1.0_224", "source": "MindSpore", "top1_percent": 72.4},
            {"model": "mobilenet_v2_1.0_224", "source": "TensorFlow", "top1_percent": 71.8},
            {"model": "mobilenet_v2_1.0_224", "source": "timm", "top1_percent": 72.9},
            {"model": "mobilenet_v2_1.0_224", "source": "measured here", "top1_percent": 78.2, "pictures": 1000},
            {"model": "mobilenet_v2_1.0_224", "runner": "mbv2", **LATENCY},
            {"model": "mobilenet_v2_1.0_224", "runner": "torchvision eager", **LATENCY},
        ],
    ),
}


@pytest.mark.parametrize("bench", RESULTS)
def test_plot_draws_every_picture_of_a_result_again(
    tmp_path: Path, bench: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RESULTS[bench].write(tmp_path / "a_1.0_224.json")
    assert cli.main(["plot", str(tmp_path / "a_1.0_224.json")]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    suffixes = ("_top1", "_latency") if bench == "accuracy" else ("",)
    assert names == [f"a_1.0_224{suffix}.png" for suffix in suffixes]
    first = [(tmp_path / name).read_bytes() for name in names]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 150
            assert len(picture.getcolors(1 << 24)) > 20
    cli.main(["plot", str(tmp_path / "a_1.0_224.json")])
    assert [(tmp_path / name).read_bytes() for name in names] == first


@pytest.mark.parametrize("bench", RESULTS)
def test_show_prints_the_table_again(tmp_path: Path, bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    RESULTS[bench].write(tmp_path / "r.json")
    assert cli.main(["show", "--markdown", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(RESULTS[bench].rows)
    assert cli.main(["show", str(tmp_path / "r.json")]) == 0
    assert f"python -m bench {bench}" in capsys.readouterr().out


def test_every_committed_result_has_its_pictures_and_can_be_drawn(tmp_path: Path) -> None:
    folder = Path(cli.__file__).parent / "results"
    files = [path for path in folder.glob("*.json") if schema.SCHEMA in path.read_text()[:200]]
    for path in files:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        for png in cli.importlib.import_module("bench.plots").draw(schema.read(copy), copy):
            assert (folder / png.name).is_file(), f"python -m bench plot {path.name} was not run"
            assert (folder / png.name).stat().st_size < 150_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["speed"], "no benchmark 'speed'; choose kernels, model"),
        (["plot"], "give the JSON files"),
        (["show"], "give the JSON files"),
        (["plot", "none.json"], "none.json: cannot be read"),
        (["loader", "--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["loader", "--rounds", "1"], "at least 2"),
        (["accuracy", "--pretrained", "w.pth"], "--pretrained and --data_url go together"),
        (["kernels", "--model", "big"], "a model is width_resolution"),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_benchmark_that_this_checkout_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.BENCHES, "roofline", ("bench.nothing_here", ""))
    assert cli.main(["roofline"]) == 2
    assert "no bench/nothing_here.py" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "bench.memory", raising=False)
    assert cli.main(["memory"]) == 2
    assert "memory needs torchvision, which is not installed: pip install 'mbv2[bench]'" in capsys.readouterr().err


def test_usage_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*cli.BENCHES, "plot", "show"))


def test_a_result_without_a_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result("unknown").write(tmp_path / "r.json")
    assert cli.main(["plot", str(tmp_path / "r.json")]) == 2
    assert "a result of 'unknown' has no picture" in capsys.readouterr().err
