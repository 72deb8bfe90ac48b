"""The README's Python lines, run as they stand on a checkpoint of main.py."""
import importlib.util
import inspect
import json
import os
import re

import main
import pretrained
import pytest
import timm
import torch
import utils
from conftest import ROOT, run_ranks
from data import eval_transform
from PIL import Image
from vision_transformer import build_backbone

SECTION = re.search(r"\n## Use in Python, export\n.*?```python\n(.*?)```(.*?)\n## ",
                    (ROOT / "README.md").read_text(), re.DOTALL)
ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript")))


@pytest.fixture(scope="module")
def ran(images, tmp_path_factory):
    """What the README's lines define, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("readme")
    run = main.Run(main.parse_args([
        "--arch", "vit_tiny", "--local_crops_number", "0", "--out_dim", "16", "--batch_size_per_gpu", "2",
        "--device", "cpu", "--data_path", str(images / "train"), "--output_dir", str(folder / "OUT")]),
        torch.device("cpu"))
    (folder / "OUT").mkdir()
    utils.save_checkpoint(run.state_dict(), folder / "OUT" / "checkpoint.pth")
    pretrained.export_backbone(run.eval_backbone, run.description, folder / "OUT" / "backbone.safetensors")
    Image.radial_gradient("L").resize((300, 260)).save(folder / "photo.jpg")
    lines = SECTION[1].splitlines()
    code = "\n".join(line for line in lines if ONNX or not line.startswith("torch.onnx"))
    return run_ranks(execute, 1, code, folder)[0], folder, run.eval_backbone.eval()


def execute(code, folder):
    """In a process of its own: torch.export starts autograd's threads, after which no process may fork."""
    os.chdir(folder)
    names = {}
    exec(code, names)
    exported = torch.export.load("OUT/backbone.pt2").module()(more_images())
    return {"embedding": names["embedding"], "model": names["model"], "exported": exported}


def more_images():
    """More than the example has."""
    return torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_embedding_timm_and_torch_export_give_the_networks_outputs(ran):
    names, folder, backbone = ran
    transform = eval_transform(224, main.IMAGENET_MEAN, main.IMAGENET_STD)
    image = transform(Image.open(folder / "photo.jpg").convert("RGB"))
    with torch.no_grad():
        torch.testing.assert_close(names["embedding"], backbone(image[None]))
        expected = backbone(more_images())
        torch.testing.assert_close(names["model"].eval()(more_images()), expected)
    torch.testing.assert_close(names["exported"], expected, rtol=1e-4, atol=1e-4)


def test_timm_resamples_the_position_embeddings_of_other_crop_sizes(tmp_path):
    backbone = build_backbone("vit_tiny", image_size=96).eval()
    description = pretrained.Description("vit_tiny", 16, 96, main.IMAGENET_MEAN, main.IMAGENET_STD)
    pretrained.export_backbone(backbone, description, tmp_path / "backbone.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained=True,
                              pretrained_cfg_overlay={"file": str(tmp_path / "backbone.safetensors")})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(more_images()), backbone(more_images()))


@pytest.mark.skipif(not ONNX, reason="onnx and onnxscript are optional")
def test_onnx_gives_the_same_outputs(ran):
    from onnx.reference import ReferenceEvaluator
    _, folder, backbone = ran
    evaluator = ReferenceEvaluator(str(folder / "OUT" / "backbone.onnx"))
    name, = evaluator.input_names
    outputs, = evaluator.run(None, {name: more_images().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(outputs), backbone(more_images()), rtol=1e-3, atol=1e-3)


def test_what_would_be_published_tells_how_images_are_normalised(ran, tmp_path):
    names, *_ = ran
    inspect.signature(timm.models.push_to_hf_hub).bind(names["model"], "YOU/NAME")  # called so in the README
    assert 'timm.models.push_to_hf_hub(model, "YOU/NAME")' in SECTION[2]
    timm.models.save_for_hf(names["model"], tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert tuple(told["mean"]) == main.IMAGENET_MEAN and tuple(told["std"]) == main.IMAGENET_STD
