import pytest
import yaml

from mbv2.errors import UserError
from mbv2.train.options import TrainOptions, as_yaml, check, parse

SEED = {
    "device_target", "data_url", "pretrained", "run_distribute", "num_parallel_workers", "dataset_sink_mode",
    "num_classes", "batch_size", "repeat_num", "momentum", "epoch_size", "keep_checkpoint_max", "ckpt_save_dir",
    "lr_decay_mode", "decay_epoch", "smooth_factor", "max_lr", "min_lr", "milestone", "learning_rates", "alpha",
    "resize",
}  # fmt: skip


def parsed(*argv: str) -> TrainOptions:
    return parse(["--data_url", "pictures", *argv])


def test_every_parameter_of_the_seed_has_its_name():
    assert set(TrainOptions.__dataclass_fields__) >= SEED


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("false", False), ("True", True), ("/a/w.pth", "/a/w.pth")]
)
def test_pretrained_is_a_truth_value_or_a_path(text, value):
    assert parsed("--pretrained", text).pretrained == value
    assert type(parsed("--pretrained", text).pretrained) is type(value)


@pytest.mark.parametrize("form", [["--milestone", "3,6"], ["--milestone=3,6"], ["--milestone", "[3, 6]"]])
def test_a_list_is_given_with_commas_or_brackets(form):
    options = parsed("--lr_decay_mode=milestone", "--learning_rates", "0.1,0.01", *form)
    assert options.milestone == [3, 6]
    assert options.learning_rates == [0.1, 0.01]


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 0.5\nresize: 96\ndata_url: there\npretrained: false\namp:\n  dtype: bf16\n")
    options = parse(["-c", str(file), "--resize", "128", "--ema.decay=0.9"])
    assert (options.alpha, options.resize, options.data_url) == (0.5, 128, "there")
    assert (options.amp.dtype, options.ema.decay, options.pretrained) == ("bf16", 0.9, False)


def test_the_resolved_options_read_back_the_same(tmp_path):
    options = parsed("--lr_decay_mode=milestone", "--milestone=1", "--learning_rates=0.5", "--augment.mixup=0.2")
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(options))
    assert yaml.safe_load(file.read_text())["augment"]["mixup"] == 0.2
    assert parse(["-c", str(file)]) == options


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--alpha=-1", "--alpha -1"),
        ("--alpha=inf", "--alpha"),
        ("--batch_size=0", "--batch_size 0"),
        ("--batch_size=x", "batch_size"),
        ("--bogus=1", "--bogus"),
        ("--batch=3", "--batch"),
        ("--resize=31", "--resize 31"),
        ("--epoch_size=0", "--epoch_size 0"),
        ("--seed=-1", "--seed -1"),
        ("--lr_decay_mode=linear", "choose cosine_decay_lr"),
        ("--lr_decay_mode=exponential", "--min_lr"),
        ("--milestone=1,2", "--lr_decay_mode milestone"),
        ("--max_lr=0", "--max_lr 0"),
        ("--min_lr=1", "--min_lr 1"),
        ("--momentum=1", "--momentum 1"),
        ("--smooth_factor=1", "--smooth_factor 1"),
        ("--dropout=1", "--dropout 1"),
        ("--warmup_epochs=200", "--warmup_epochs 200"),
        ("--weight_decay=-1", "--weight_decay -1"),
        ("--class_offset=2", "--class_offset 2"),
        ("--num_classes=0", "--num_classes 0"),
        ("--loader=magic", "--loader magic"),
        ("--device_target=Ascend", "choose gpu"),
        ("--on_corrupt=ignore", "--on_corrupt ignore"),
        ("--amp.dtype=int8", "--amp.dtype int8"),
        ("--ema.decay=1", "--ema.decay 1"),
        ("--augment.mixup=-0.1", "--augment.mixup"),
        ("--augment.flip=2", "--augment.flip"),
        ("--augment.area_min=0", "--augment.area_min"),
        ("--resume=nowhere.ckpt", "nowhere.ckpt"),
        ("--ckpt_save_dir=", "--ckpt_save_dir"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_wrong_value_is_named(argument, says):
    with pytest.raises(UserError) as error:
        parsed(argument)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--milestone=1,2", "--learning_rates=0.1"], ["--milestone=2,1", "--learning_rates=0.1,0.01"], []]
)
def test_milestones_must_rise_and_match_their_learning_rates(arguments):
    with pytest.raises(UserError, match="--milestone"):
        parsed("--lr_decay_mode=milestone", *arguments)


def test_data_is_needed_unless_synthetic():
    with pytest.raises(UserError, match="--data_url is needed"):
        parse([])
    check(TrainOptions(loader="synthetic"))
