import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mbv2.zoo import list_models

ROOT = Path(__file__).resolve().parents[1]


def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_an_entry_point():
    # As torch.hub.list finds them; it takes no local folder itself.
    entries = {name for name, value in vars(hubconf()).items() if callable(value) and not name.startswith("_")}
    assert entries == {"mobilenet_v2"} | {name.replace(".", "_") for name in list_models()}


def test_a_variant_loads_with_the_asked_number_of_classes():
    model = torch.hub.load(str(ROOT), "mobilenet_v2_0_35_96", source="local", num_classes=7).eval()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_a_width_outside_the_table_loads_by_alpha():
    model = torch.hub.load(str(ROOT), "mobilenet_v2", source="local", alpha=0.6, num_classes=3).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_pretrained_weights_come_from_a_path(tmp_path):
    made = torch.hub.load(str(ROOT), "mobilenet_v2_0_35_96", source="local")
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    loaded = torch.hub.load(str(ROOT), "mobilenet_v2_0_35_96", source="local", pretrained=str(tmp_path / "weights.pth"))
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_entry_point_says_what_it_builds():
    assert "mobilenet_v2_1.4_224" in hubconf().mobilenet_v2_1_4_224.__doc__


@pytest.mark.parametrize("name", ["mobilenet_v2_1.0_224", "mobilenet_v3"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(RuntimeError, match="Cannot find callable"):
        torch.hub.load(str(ROOT), name, source="local")


def test_hub_loads_from_a_bare_clone_with_nothing_installed(tmp_path: Path) -> None:
    for name in ("hubconf.py", "mbv2", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    # Not installed: without the finders and paths that an installation of the project put there.
    script = (
        "import sys, torch\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()"
        " and 'editable' not in getattr(f, '__name__', '').lower()]\n"
        "model = torch.hub.load(sys.argv[1], 'mobilenet_v2_0_35_96', source='local', num_classes=3)\n"
        "print(tuple(model.eval()(torch.zeros(1, 3, 96, 96)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3)"
