"""visualize.py: the values behind its pictures, and the pictures' parts."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import visualize
from conftest import refusal
from PIL import Image
from pretrained import load_backbone
from vision_transformer import build_backbone

COMMON = ["--random_weights", "--device", "cpu", "--num_workers", "0"]
VIT = ["--arch", "vit_tiny", "--patch_size", "8", "--image_size", "32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images; the third is a copy of the first."""
    folder = tmp_path_factory.mktemp("photos")
    for index, seed in enumerate((0, 1, 0)):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(3)]


@pytest.fixture
def grids(monkeypatch):
    """The arguments of image_grid, call by call."""
    calls, draw = [], visualize.image_grid
    monkeypatch.setattr(visualize, "image_grid", lambda *args: (calls.append(args), draw(*args))[1])
    return calls


@pytest.mark.parametrize("arch, prefix", [("vit_tiny", 1), ("timm/deit_tiny_distilled_patch16_224", 2)])
def test_attention_of_our_and_timms_vits(arch, prefix):
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=48).eval()
    images = torch.randn(2, 3, 48, 48)
    before = backbone(images)
    attention = visualize.last_attention(backbone, images)
    assert attention.shape == (2, 3, prefix + 9, prefix + 9)
    block, tokens = backbone.blocks[-1], []
    hook = block.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    torch.testing.assert_close(backbone(images), before, rtol=0, atol=0)    # nothing is left changed
    hook.remove()
    q, k, _ = block.attn.qkv(block.norm1(tokens[0])).chunk(3, -1)
    for head in range(3):
        part = slice(64 * head, 64 * (head + 1))
        scores = (q[..., part] @ k[..., part].mT / 8).softmax(-1)
        torch.testing.assert_close(attention[:, head], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch, shape", [
    ("vit_tiny", (4, 4, 192)), ("cifar/tiny", (8, 8, 64)), ("timm/efficientnet_b0", (2, 2, 1280)),
    ("timm/swin_tiny_patch4_window7_224", (2, 2, 768))])
def test_patch_features_of_any_network(arch, shape):
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    features = visualize.patch_features(backbone, images)
    assert features.shape == (2, *shape)
    if arch == "vit_tiny":
        expected, = backbone.get_intermediate_layers(images, norm=True)
        torch.testing.assert_close(features.flatten(1, 2), expected)
    else:                                                              # whose mean is the feature
        torch.testing.assert_close(features.mean((1, 2)), backbone(images), rtol=1e-4, atol=1e-5)
        assert "no attention of a class token" in refusal(visualize.last_attention, backbone, images)


def test_tokens_of_other_networks_are_a_grid_or_an_error():
    def network(features, **more):
        return SimpleNamespace(forward_features=lambda images: features, **more)
    tokens = torch.arange(18.0).view(1, 9, 2)
    assert torch.equal(visualize.patch_features(network(tokens), None), tokens.view(1, 3, 3, 2))  # a mixer's
    for features in (tokens[:, :8], tokens[0], [tokens]):
        assert "no grid of patches; draw map" in refusal(visualize.patch_features, network(features), None)


@pytest.mark.parametrize("patch_embed", [SimpleNamespace(patch_size=5), SimpleNamespace(patch_size=(5, 5))])
def test_the_patch_size_is_a_number_or_a_pair(patch_embed):
    args = SimpleNamespace(resolution=32)
    error = refusal(visualize.image_picture, args, SimpleNamespace(patch_embed=patch_embed), None, None)
    assert "32 is no multiple of the patch size 5" in error


def test_principal_components_with_fixed_signs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator) * torch.tensor([1, 5, 3, 0.1, 2, 1]) + 7
    points, shares = visualize.principal_components(rows, 3)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    u, s, vectors = np.linalg.svd(centred, full_matrices=False)
    signs = [np.sign(vector[np.abs(vector).argmax()]) for vector in vectors[:3]]
    np.testing.assert_allclose(points, u[:, :3] * s[:3] * signs, atol=1e-9)
    np.testing.assert_allclose(shares, s[:3] ** 2 / (s ** 2).sum(), atol=1e-12)


def test_attention_picture(photos, tmp_path, grids):
    output = tmp_path / "new" / "a.png"
    visualize.main(["attention", "--images", *photos, *VIT, *COMMON, "--output", str(output)])
    (rows, _), = grids
    torch.manual_seed(0)
    backbone, _ = load_backbone(None, None, "vit_tiny", 8, 32, random_weights=True)
    mean, std = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for number, ((seen, name), *maps) in enumerate(rows):              # the image as the network sees it
        image = ((seen - mean) / std).movedim(-1, 0)[None]
        attention = visualize.last_attention(backbone, image)[0, :, 0, 1:]
        expected = 100 * torch.cat([attention.mean(0, keepdim=True), attention]).unflatten(1, (4, 4))
        found, labels = zip(*maps)
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-4)
        assert [name, *(label.split(":")[0] for label in labels)] == [
            str(number), "mean", "head 1", "head 2", "head 3"]
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > 700 and picture.height > 500


def test_patches_picture_shares_its_components(photos, tmp_path, monkeypatch, grids):
    monkeypatch.chdir(tmp_path)
    visualize.main(["patches", "--images", *photos, *VIT, "--resolution", "64", *COMMON])
    assert (tmp_path / "patches.png").exists()
    (seen, colours), _ = grids[0]
    colours = torch.stack([colour for colour, _ in colours])
    assert colours.shape == (3, 8, 8, 3) and len(seen) == 3
    assert torch.equal(colours[0], colours[2]) and not torch.allclose(colours[0], colours[1])
    assert colours.flatten(0, 2).amin(0).tolist() == [0, 0, 0] and colours.amax() == 1


@pytest.mark.parametrize("method, title", [("pca", "PCA"), ("tsne", "t-SNE")])
def test_map_colours_every_class(images, tmp_path, monkeypatch, method, title):
    figures, draw = [], visualize.map_picture
    monkeypatch.setattr(visualize, "map_picture", lambda *args: figures.append(draw(*args)) or figures[-1])
    output = tmp_path / "map.png"
    visualize.main(["map", "--data_path", str(images / "train"), "--images_per_class", "6", "--method",
                    method, "--arch", "cifar/tiny", *COMMON, "--output", str(output)])
    axis, = figures[0].axes
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["cat", "dog", "owl"]
    assert [len(dots.get_offsets()) for dots in axis.collections] == [6, 6, 6]
    assert len({tuple(dots.get_facecolor()[0]) for dots in axis.collections}) == 3
    assert axis.get_title() == f"{title} of the features of 18 images of 3 classes (cifar/tiny)"
    assert output.exists()


@pytest.mark.parametrize("argv, message", [
    ("attention --arch vit_tiny", "--images is missing"), ("map --arch vit_tiny", "--data_path is missing"),
    ("map --images PHOTO", "--images cannot be used with map"),
    ("patches --images PHOTO --method pca", "--method cannot be used with patches"),
    ("patches --images PHOTO --arch vit_tiny --resolution 30", "--resolution 30 is no multiple of the patch"),
    ("attention --images PHOTO --arch cifar/tiny", "only ViTs have; draw patches or map"),
    ("patches --images nowhere.png --arch vit_tiny", "nowhere.png is missing")])
def test_mistakes_are_one_line(photos, argv, message):
    assert message in refusal(visualize.main, [*argv.replace("PHOTO", photos[0]).split(), *COMMON])
