"""bench.cpu: the LiteRT file it writes is the model, and its parts add up to the whole."""

from pathlib import Path

import pytest
import torch

from bench import cpu, cpu_peers
from mbv2 import optimized
from mbv2.kernels import cpu_network


@torch.no_grad()
def test_the_litert_peer_computes_the_model(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    models = cpu_peers.make_models(0.35)
    x = torch.randn(2, 3, 64, 64)
    run = cpu_peers.litert(models, cpu_peers.Case(0.35, 64, 2, 1), x, str(tmp_path))
    torch.testing.assert_close(torch.tensor(run(x)), models[1](x), rtol=1e-4, atol=1e-5)


def test_the_litert_peer_refuses_sizes_that_its_padding_does_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(ValueError, match="72 pixels"):
        cpu_peers.litert(cpu_peers.make_models(0.35), cpu_peers.Case(0.35, 72, 1, 1), torch.zeros(1), str(tmp_path))


@pytest.mark.parametrize(("width", "resolution"), [(1.0, 224), (0.5, 100)])
def test_the_parts_add_up_to_the_whole(width: float, resolution: int) -> None:
    model = cpu_peers.make_models(width)[0]
    parts = cpu.part_work(optimized.block_shapes(model), model.last_channel, model.num_classes, resolution)
    assert sum(part["flop"] for part in parts) == 2 * cpu.multiply_adds(width, resolution)


@pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}")
@torch.no_grad()
def test_every_part_is_timed() -> None:
    parts = cpu.measure_parts(0.35, 64, 1, 0)["parts"]
    assert [part["name"] for part in parts[-2:]] == ["head", "classifier"]
    assert all(part["ms"] > 0 and part["percent_of_peak"] > 0 for part in parts)


@torch.no_grad()
def test_the_environment_names_machine_and_versions() -> None:
    found = cpu.environment()
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["cpu"]["model"]
