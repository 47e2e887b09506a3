"""Folders as people have them, and the sentences for those that nobody can use."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mbv2.data.sources import Source, has_split, image_files, open_source
from mbv2.errors import UserError
from mbv2.labels import imagenet_synsets


def picture(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes | str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = picture() if data is None else data
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def labels(source: Source) -> dict[str, int]:
    return {sample.name: sample.label for sample in source.samples}


def test_class_folders_are_numbered_in_their_names_order(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split / "dog" / "a.png")
        write(tmp_path / split / "cat" / "b.JPG")
    for split in ("train", "val"):
        source = open_source(tmp_path, split)
        assert labels(source) == {"cat/b.JPG": 0, "dog/a.png": 1}
        assert source.class_names == ["cat", "dog"]
        assert source.num_classes == 2
        assert not source.is_imagenet
        assert all(split in sample.path for sample in source.samples)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_the_validation_split_goes_by_several_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / name / "a" / "2.png")
    assert labels(open_source(tmp_path, "val")) == {"a/2.png": 0}


def test_a_bare_tree_of_class_folders_serves_either_split(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "b" / "deeper" / "2.png")
    for split in ("train", "val"):
        assert labels(open_source(tmp_path, split)) == {"a/1.png": 0, "b/deeper/2.png": 1}


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "a" / "._1.png")
    write(tmp_path / "a" / "notes.txt", "hello")
    write(tmp_path / ".cache" / "2.png")
    source = open_source(tmp_path, "train")
    assert labels(source) == {"a/1.png": 0}
    assert source.class_names == ["a"]
    assert [path.name for path in image_files(tmp_path)] == ["1.png"]


def test_a_class_without_validation_pictures_does_not_shift_the_others(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "train" / name / "1.png")
    write(tmp_path / "val" / "c" / "2.png")
    source = open_source(tmp_path, "val")
    assert labels(source) == {"c/2.png": 2}
    assert source.class_names == ["a", "b", "c"]


def test_the_given_class_list_numbers_the_folders(tmp_path: Path) -> None:
    write(tmp_path / "b" / "1.png")
    assert labels(open_source(tmp_path, "val", class_names=["c", "b", "a"])) == {"b/1.png": 1}


def test_a_class_that_training_does_not_know_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / "val" / "a" / "2.png")
    write(tmp_path / "val" / "new" / "3.png")
    with pytest.raises(UserError, match=r"new: class 'new' is not among the 1 classes"):
        open_source(tmp_path, "val")


def test_some_of_imagenets_synset_folders_have_imagenets_labels(tmp_path: Path) -> None:
    write(tmp_path / "train" / "n02123394" / "1.JPEG")
    write(tmp_path / "train" / "n01440764" / "2.JPEG")
    write(tmp_path / "val" / "n02123394" / "3.JPEG")
    train, val = open_source(tmp_path, "train"), open_source(tmp_path, "val")
    assert labels(train) == {"n01440764/2.JPEG": 0, "n02123394/1.JPEG": 283}
    assert labels(val) == {"n02123394/3.JPEG": 283}
    for source in (train, val, open_source(tmp_path, "val", train.class_names)):
        assert source.is_imagenet
        assert source.num_classes == 1000
        assert source.class_names[283] == "Persian cat"
        assert source.synsets is not None
        assert source.synsets[283] == "n02123394"


def test_synset_folders_beside_another_class_are_classes_like_any(tmp_path: Path) -> None:
    write(tmp_path / "train" / "n02123394" / "1.png")
    write(tmp_path / "train" / "mine" / "2.png")
    write(tmp_path / "val" / "n02123394" / "3.png")
    assert open_source(tmp_path, "train").class_names == ["mine", "n02123394"]
    assert labels(open_source(tmp_path, "val")) == {"n02123394/3.png": 1}


def test_synset_folders_for_a_network_of_a_few_such_classes_keep_its_numbers(tmp_path: Path) -> None:
    write(tmp_path / "n02123394" / "1.png")
    source = open_source(tmp_path, "val", class_names=["n01440764", "n02123394"])
    assert labels(source) == {"n02123394/1.png": 1}
    assert not source.is_imagenet


def test_labels_csv_finds_pictures_beside_it_and_in_images(tmp_path: Path) -> None:
    write(tmp_path / "images" / "1.png")
    write(tmp_path / "2.png")
    write(tmp_path / "labels.csv", "file,label\n1.png,2\n2.png,0\n")
    source = open_source(tmp_path, "val")
    assert labels(source) == {"1.png": 2, "2.png": 0}
    assert source.num_classes == 3
    assert not source.is_imagenet
    assert source.read(source.samples[0]) == picture()


def test_labels_csv_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    write(tmp_path / "labels.csv", b"\xef\xbb\xbffile,label\r\n1.png,1\r\n")
    assert labels(open_source(tmp_path, "val")) == {"1.png": 1}


def test_labels_csv_with_imagenets_synsets_is_imagenet(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    write(tmp_path / "labels.csv", "file,label,synset\n1.png,283,n02123394\n")
    source = open_source(tmp_path, "val")
    assert source.is_imagenet
    assert source.num_classes == 1000


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("name,class\n1.png,0\n", r"first line must be file,label"),
        ("", r"first line must be file,label"),
        ("file,label\n", r"lists no picture"),
        ("file,label\n1.png,cat\n", r"line 2: label 'cat' is not a number"),
        ("file,label\n1.png\n", r"line 2: label None is not a number"),
        ("file,label\n1.png,0\n1.png,-1\n", r"line 3: label -1 is out of range"),
        ("file,label\n1.png,99999999999\n", r"line 2: label 99999999999 is out of range"),
        ("file,label\n9.png,0\n", r"line 2: no file '9.png'"),
        ("file,label\n,0\n", r"line 2: no file ''"),
        ("file,label,synset\n1.png,3,n02123394\n", r"1.png has label 3, but n02123394 is class 283"),
        (b"file,label\n1.png,0\n\xff\xfe.png,1\n", r"not UTF-8"),
    ],
)
def test_an_unusable_labels_csv_is_an_error(tmp_path: Path, table: str | bytes, why: str) -> None:
    write(tmp_path / "1.png")
    write(tmp_path / "labels.csv", table)
    with pytest.raises(UserError, match=rf"labels\.csv.*{why}"):
        open_source(tmp_path, "val")


def test_a_label_outside_the_given_classes_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    write(tmp_path / "labels.csv", "file,label\n1.png,5\n")
    with pytest.raises(UserError, match=r"1\.png has label 5, but there are 5 classes \(0\.\.4\)"):
        open_source(tmp_path, "val", class_names=list("abcde"))


def test_shards_are_read_by_offset(tmp_path: Path) -> None:
    one = {"000.jpg": picture(1), "000.cls": b"1", "001.png": picture(2), "001.json": json.dumps({"label": 0}).encode()}
    write_tar(tmp_path / "train-000.tar", one)
    write_tar(tmp_path / "train-001.tar", {"dir/002.cls": b"2\n", "dir/002.JPEG": picture(3)})
    write_tar(tmp_path / "val-000.tar", {"9.jpg": picture(4), "9.cls": b"0"})
    source = open_source(tmp_path, "train")
    assert labels(source) == {"train-000.tar:000.jpg": 1, "train-000.tar:001.png": 0, "train-001.tar:dir/002.JPEG": 2}
    assert [source.read(sample) for sample in source.samples] == [picture(1), picture(2), picture(3)]
    assert source.num_classes == 3
    assert labels(open_source(tmp_path, "val")) == {"val-000.tar:9.jpg": 0}


def test_shards_in_split_folders_take_class_names_from_classes_txt(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": picture(), "0.cls": b"1"})
    write_tar(tmp_path / "val" / "a.tar", {"0.jpg": picture(), "0.cls": b"0"})
    write(tmp_path / "classes.txt", "cat\ndog\nfox\n")
    for split in ("train", "val"):
        assert open_source(tmp_path, split).class_names == ["cat", "dog", "fox"]


def test_shards_with_imagenets_list_of_synsets_are_imagenet(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": b"283"})
    write(tmp_path / "classes.txt", "\n".join(imagenet_synsets()))
    source = open_source(tmp_path, "val")
    assert source.is_imagenet
    assert source.class_names[283] == "Persian cat"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"0.jpg": b"x"}, r"0\.jpg has no label; put 0\.cls or 0\.json"),
        ({"0.jpg": b"x", "0.cls": b"cat"}, r"0\.cls: no label in it"),
        ({"0.jpg": b"x", "0.json": b'{"class": 1}'}, r"0\.json: no label in it"),
        ({"0.jpg": b"x", "0.json": b"\xff"}, r"0\.json: no label in it"),
        ({"0.jpg": b"x", "0.cls": b"-2"}, r"label -2 is out of range"),
        ({"0.txt": b"x"}, r"hold no picture"),
    ],
)
def test_unusable_shards_are_an_error(tmp_path: Path, members: dict[str, bytes], why: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=why):
        open_source(tmp_path, "train")


def test_a_label_outside_classes_txt_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": b"2"})
    write(tmp_path / "classes.txt", "cat\ndog\n")
    with pytest.raises(UserError, match=r"a\.tar:0\.jpg has label 2, but there are 2 classes"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("damage", ["text", "compressed", "cut in a picture", "header overwritten"])
def test_a_damaged_shard_is_an_error_rather_than_fewer_pictures(tmp_path: Path, damage: str) -> None:
    members = {}
    for i in range(4):
        members |= {f"{i}.jpg": picture(i) * 20, f"{i}.cls": b"0"}
    path = write_tar(tmp_path / "a.tar", members)
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        offset = archive.getmember("2.jpg").offset
    if damage == "text":
        path.write_bytes(b"no tar at all" * 100)
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("0.jpg"))
    elif damage == "cut in a picture":
        path.write_bytes(data[: offset + 600])
    else:
        path.write_bytes(data[:offset] + b"\x55" * 512 + data[offset + 512 :])
    with pytest.raises(UserError, match=r"a\.tar: (not a readable|damaged)"):
        open_source(tmp_path, "train")


def test_a_missing_split_says_where_to_put_it(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "1.png")
    with pytest.raises(UserError, match=r"has train/ but no val/; put the pictures"):
        open_source(tmp_path, "val")
    assert has_split(tmp_path, "train")
    assert not has_split(tmp_path, "val")


def test_missing_shards_of_a_split_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {"0.jpg": picture(), "0.cls": b"0"})
    with pytest.raises(UserError, match=r"no val-\*\.tar"):
        open_source(tmp_path, "val")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder at .*gone; give --data_url"):
        open_source(tmp_path / "gone", "train")
    with pytest.raises(UserError, match=r"--data_url is empty"):
        open_source("", "train")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures in a known layout"):
        open_source(tmp_path, "train")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="class folders hold no picture"):
        open_source(tmp_path, "train")


def test_a_picture_that_vanished_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "1.png")
    source = open_source(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"a/1\.png: cannot be read"):
        source.read(source.samples[0])


def test_the_real_evaluation_folder_is_imagenet(shared_data: Path) -> None:
    source = open_source(shared_data / "eval" / "nips17_ccby_299", "val")
    assert len(source.samples) == 700
    assert source.is_imagenet
