"""Backbones: layers, attention and tails by value against timm, weights that fit or do not, no hub."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from embedkit import weights as weights_module
from embedkit.backbones import compile_backbone, list_backbones, load_backbone, suggest_backbones
from embedkit.errors import BackboneError
from embedkit.forward import require_compiled
from embedkit.planning import make_recipe
from embedkit.vit import VitBackbone

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
ROPE = {**SMALL, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
DINOV3 = {
    **SMALL,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "use_fc_norm": False,
    "dynamic_img_size": True,
    "init_values": 1.0,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "plain": partial(VisionTransformer, **SMALL),
    "registers": partial(VisionTransformer, **SMALL, reg_tokens=4, no_embed_class=True, init_values=1.0),
    "query and key norms": partial(VisionTransformer, **SMALL, qk_norm=True),
    "dinov3": partial(Eva, **DINOV3, qkv_bias=True),
    "dinov3 without bias": partial(Eva, **DINOV3, qkv_bias=False),
    "eva02": partial(Eva, **ROPE, swiglu_mlp=True, qkv_fused=False, use_fc_norm=False),
    "eva post norm": partial(Eva, **SMALL, use_post_norm=True, use_fc_norm=False),
    "mixed rope": partial(Eva, **ROPE, rope_type="mixed", use_fc_norm=False),
    "rope attention": partial(Eva, **ROPE, attn_type="rope", use_fc_norm=False),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations on several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(family: str) -> VitBackbone:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():  # biases, norms and registers too: zeros would hide a missing one
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    return VitBackbone(model, name=family, weights="sha256:0", mean=MEAN, std=STD)


def normalized(images: Tensor) -> Tensor:
    return (images.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def save(model: Any, file: Path) -> Path:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model("test_vit", num_classes=10), tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_models_own_normed_output(family: str, images: Tensor) -> None:
    backbone = make(family)
    expected = backbone.model.forward_features(normalized(images))
    tokens = backbone.forward_layers(images, [4]).layers[4]
    prefix = backbone.info.class_tokens + backbone.info.register_tokens
    torch.testing.assert_close(tokens.summary, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, prefix:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_continues_from_any_block_to_the_same_output(family: str, images: Tensor) -> None:
    backbone = make(family)
    output = backbone.forward_layers(images, [1, 2, 3, 4])
    for layer in (1, 3):
        sequence = output.layers[layer].sequence
        assert sequence is not None
        ended = backbone.run_tail(sequence, layer)
        torch.testing.assert_close(ended.summary, output.layers[4].summary)
        torch.testing.assert_close(ended.patches, output.layers[4].patches)
        torch.testing.assert_close(ended.sequence, output.layers[4].sequence)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_the_explicit_softmax_of_the_last_block(family: str, images: Tensor) -> None:
    backbone = make(family)
    block = backbone.model.blocks[-1].attn
    block.fused_attn = False
    seen: list[Tensor] = []
    block.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    backbone.model.forward_features(normalized(images))
    given = backbone.forward_layers(images, [], attention=True).attention
    prefix = backbone.info.class_tokens + backbone.info.register_tokens
    assert len(seen) == 1, "the last block itself does not run for its attention"
    torch.testing.assert_close(given, seen[0][:, :, 0, prefix:])


def test_an_earlier_layer_is_the_raw_stream_and_later_blocks_do_not_run(images: Tensor) -> None:
    backbone = make("registers")
    streams: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.model.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, output, number=number: streams.__setitem__(number, output))
    tokens = backbone.forward_layers(images, [2]).layers[2]
    assert sorted(streams) == [1, 2]
    torch.testing.assert_close(tokens.sequence, streams[2])
    torch.testing.assert_close(tokens.summary, streams[2][:, 0])
    torch.testing.assert_close(tokens.patches, streams[2][:, 5:])


def test_registers_are_told_apart_from_the_class_token_and_the_patches() -> None:
    info = make("dinov3").info
    assert (info.class_tokens, info.register_tokens, info.grids[-1]) == (1, 4, (4, 4))
    assert info.summary == "class token"
    assert info.attention_heads == 3


def test_one_channel_means_the_same_as_three_equal_ones(images: Tensor) -> None:
    backbone = make("plain")
    one = backbone.forward_layers(images, [4]).layers[4].patches
    three = backbone.forward_layers(images.expand(-1, 3, -1, -1), [4]).layers[4].patches
    assert torch.equal(one, three)


def test_an_attention_pool_is_the_summary_of_the_last_layer_alone(images: Tensor) -> None:
    model = VisionTransformer(**SMALL, class_token=False, global_pool="map").eval().requires_grad_(False)
    backbone = VitBackbone(model, name="siglip", weights="sha256:0", mean=MEAN, std=STD)
    output = backbone.forward_layers(images, [3, 4])
    expected = model.forward_head(model.forward_features(normalized(images)), pre_logits=True)
    torch.testing.assert_close(output.layers[4].summary, expected)
    assert output.layers[3].summary is None
    assert backbone.info.summary_layers == (4,)
    assert backbone.info.has_tail
    ended = backbone.run_tail(torch.as_tensor(output.layers[3].sequence), 3)
    torch.testing.assert_close(ended.summary, expected)
    with pytest.raises(BackboneError, match=r"gives no attention: it has no class token \(its summary is an attention"):
        backbone.forward_layers(images, [4], attention=True)


def test_average_pooled_models_are_read_as_their_own_head_reads_them(images: Tensor) -> None:
    model = VisionTransformer(**SMALL, global_pool="avg").eval().requires_grad_(False)
    backbone = VitBackbone(model, name="gap", weights="sha256:0", mean=MEAN, std=STD)
    output = backbone.forward_layers(images, [2, 4])
    expected = model.forward_head(model.forward_features(normalized(images)), pre_logits=True)
    torch.testing.assert_close(output.layers[4].summary, expected)
    torch.testing.assert_close(output.layers[2].summary, output.layers[2].patches.mean(1))
    assert backbone.info.summary == "average pool"


def test_autocast_keeps_tokens_close_to_float32(images: Tensor) -> None:
    backbone = make("registers")
    exact = backbone.forward_layers(images, [4], attention=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone.forward_layers(images, [4], attention=True)
    assert exact.attention is not None and rough.attention is not None
    similarity = torch.cosine_similarity(exact.layers[4].patches, rough.layers[4].patches.float(), dim=-1)
    assert float(similarity.min()) > 0.995
    assert rough.attention.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ((1, 2, 64, 64), [4], r"images of shape \[1, 2, 64, 64\], expected \[batch, 1 or 3 channels, 64, 64\]"),
        ((1, 1, 32, 64), [4], r"images of shape \[1, 1, 32, 64\]"),
        ((1, 1, 64, 64), [5], "has no layer 5; its layers are 1 to 4"),
        ((1, 1, 64, 64), [0], "has no layer 0"),
    ],
)
def test_input_that_does_not_fit_is_refused(shape: tuple[int, ...], layers: list[int], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        make("plain").forward_layers(torch.zeros(shape), layers)


def test_a_tail_checks_its_tokens() -> None:
    backbone = make("plain")
    with pytest.raises(BackboneError, match="no tail after layer 4 of plain; give a layer from 1 to 3"):
        backbone.run_tail(torch.zeros(1, 17, 48), 4)
    with pytest.raises(BackboneError, match=r"tokens of shape \[1, 16, 48\], expected \[batch, 17, 48\]"):
        backbone.run_tail(torch.zeros(1, 16, 48), 2)


@pytest.mark.parametrize(("name", "depth"), [("test_resnet", 5), ("test_convnext", 4)])
def test_feature_maps_become_patch_tokens_row_by_row(tmp_path: Path, name: str, depth: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    backbone = load_backbone(name, weights=save(model, tmp_path / "cnn.safetensors"), image_size=96)
    assert backbone.info.depth == depth
    images = torch.rand(2, 3, 96, 96)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (backbone.info.mean, backbone.info.std))
    maps = model.eval().forward_intermediates((images - mean) / std, intermediates_only=True)
    output = backbone.forward_layers(images, [2, depth])
    for layer in (2, depth):
        expected = maps[layer - 1]
        assert backbone.info.grids[layer - 1] == tuple(expected.shape[2:])
        assert backbone.info.dims[layer - 1] == expected.shape[1]
        width = expected.shape[3]
        torch.testing.assert_close(output.layers[layer].patches[:, width], expected[:, :, 1, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.layers[layer].summary, expected.mean((2, 3)), atol=1e-5, rtol=1e-4)
    with pytest.raises(BackboneError, match="gives no attention: it has no class token"):
        backbone.forward_layers(images, [2], attention=True)
    with pytest.raises(BackboneError, match="its layers are feature maps, not one token sequence"):
        backbone.run_tail(torch.zeros(1, 2, 3), 1)


def test_a_classifier_in_the_file_is_left_out_and_all_else_is_loaded(tiny_weights: Path) -> None:
    backbone = load_backbone("test_vit", weights=tiny_weights)
    assert isinstance(backbone, VitBackbone)
    stored = load_file(tiny_weights)
    assert torch.equal(backbone.model.blocks[3].attn.qkv.weight, stored["blocks.3.attn.qkv.weight"])
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_torch_files_with_wrappers_give_the_same_digest_as_safetensors(tiny_weights: Path, tmp_path: Path) -> None:
    state = load_file(tiny_weights)
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    (tmp_path / "renamed").write_bytes(tiny_weights.read_bytes())
    digests = {
        load_backbone("test_vit", weights=file).info.weights
        for file in (tiny_weights, tmp_path / "plain.pth", tmp_path / "wrapped.pth", tmp_path / "renamed")
    }
    assert len(digests) == 1
    assert digests.pop().startswith("sha256:")


def test_the_digest_follows_every_weight_but_not_the_image_size(tiny_weights: Path, tmp_path: Path) -> None:
    state = load_file(tiny_weights)
    state["norm.bias"][5] += 1e-3
    save_file(state, tmp_path / "changed.safetensors")
    original = load_backbone("test_vit", weights=tiny_weights).info
    assert load_backbone("test_vit", weights=tmp_path / "changed.safetensors").info.weights != original.weights
    resized = load_backbone("test_vit", weights=tiny_weights, image_size=96).info
    assert resized.weights == original.weights
    assert (original.image_size, resized.image_size, resized.grids[0]) == (160, 96, (6, 6))


def test_position_embeddings_are_interpolated_as_timm_does_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224")
    file = save(model, tmp_path / "deit.safetensors")
    overlay = {"file": str(file)}
    with torch.inference_mode():
        direct = timm.create_model(
            "deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=128, num_classes=0
        )
        backbone = load_backbone("deit_tiny_patch16_224", weights=file, image_size=128)
        assert isinstance(backbone, VitBackbone)
        torch.testing.assert_close(backbone.model.pos_embed, direct.pos_embed)


@pytest.mark.parametrize("size", [100, 0, -16])
def test_an_image_size_that_cuts_patches_is_refused(tiny_weights: Path, size: int) -> None:
    with pytest.raises(BackboneError, match=f"image size {size} does not fit the 16 px patches of test_vit; nearest"):
        load_backbone("test_vit", weights=tiny_weights, image_size=size)


def change(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind == "missing":
        return {name: value for name, value in state.items() if not name.startswith("blocks.5.")}
    if kind == "unexpected":
        return {**state, "text_encoder.weight": torch.zeros(3)}
    if kind == "shape":
        return {**state, "blocks.0.mlp.fc1.bias": torch.zeros(7)}
    return {**state, "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"12 of \d+ missing \(blocks.5.attn.proj.bias, .* and 7 more\)"),
        ("unexpected", r"1 unexpected \(text_encoder.weight\)"),
        ("shape", r"1 of another shape \(blocks.0.mlp.fc1.bias \[7\] for \[192\]\)"),
        ("patch", r"patch_embed.proj.weight \[64, 3, 8, 8\] for \[64, 3, 16, 16\]"),
    ],
)
def test_weights_that_do_not_fit_are_reported_by_name(
    tiny_weights: Path, tmp_path: Path, kind: str, message: str
) -> None:
    save_file(change(load_file(tiny_weights), kind), tmp_path / "bad.safetensors")
    with pytest.raises(BackboneError, match=message):
        load_backbone("test_vit", weights=tmp_path / "bad.safetensors")


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol=4))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(BackboneError, match="reading more could run code, so it is refused"):
            load_backbone("test_vit", weights=tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{", "cannot be read"),
        ("text.pth", b"not weights at all", "could run code|cannot be read"),
        ("empty.pth", b"", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone("test_vit", weights=tmp_path / name)
    assert name in str(caught.value)


def test_files_without_tensors_or_without_existence_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(BackboneError, match="holds no tensors by name; expected a state dict"):
        load_backbone("test_vit", weights=tmp_path / "numbers.pth")
    with pytest.raises(BackboneError, match="does not exist; check --weights"):
        load_backbone("test_vit", weights=tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_tiny_patch16_244", "unknown backbone 'deit_tiny_patch16_244'; nearest: deit_tiny_patch16_224"),
        ("embedkit/scatering", "nearest: embedkit/scattering"),
        ("resnet50.nope", "resnet50 has no weight tag 'nope'; timm publishes: a1_in1k"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


def test_suggestions_hold_every_part_of_the_name() -> None:
    assert suggest_backbones("dinov3_small")[0] == "vit_small_patch16_dinov3"


def unreachable(*_args: Any, **_options: Any) -> Any:
    raise ConnectionError("Name or service not known")


def absent(*_args: Any, **_options: Any) -> Any:
    raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")


def test_a_hub_out_of_reach_fails_at_once_and_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "hf_hub_download", absent)
    asked: list[float] = []

    def unreachable_once(*arguments: Any, timeout: float, **options: Any) -> Any:
        asked.append(timeout)
        unreachable(*arguments, **options)

    monkeypatch.setattr(weights_module.HfApi, "model_info", unreachable_once)
    with pytest.raises(BackboneError) as caught:
        load_backbone("vit_small_patch14_reg4_dinov2.lvd142m")
    assert asked == [weights_module.HUB_TIMEOUT_S]  # one request that gives up soon, and no second one
    message = str(caught.value)
    for part in ("timm/vit_small_patch14_reg4_dinov2.lvd142m", "--weights FILE", "HF_HOME", "embedkit/scattering"):
        assert part in message
    assert "Name or service not known" in message


def test_cached_hub_weights_need_no_network_and_share_the_files_digest(
    monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def cached(repository: str, file_name: str, *, revision: str | None, local_files_only: bool = False) -> str:
        asked.append((repository, file_name))
        assert local_files_only and revision is None
        return str(tiny_weights)

    monkeypatch.setattr(weights_module, "hf_hub_download", cached)
    monkeypatch.setattr(weights_module.HfApi, "model_info", unreachable)
    assert load_backbone("test_vit").info.weights == load_backbone("test_vit", weights=tiny_weights).info.weights
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]


def test_a_model_of_the_hub_is_built_from_its_own_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_weights: Path
) -> None:
    (tmp_path / "config.json").write_text(
        '{"architecture": "test_vit", "num_classes": 10, "pretrained_cfg":'
        ' {"input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "classifier": "head",'
        ' "fixed_input_size": true}}'
    )
    (tmp_path / "model.safetensors").write_bytes(tiny_weights.read_bytes())

    def cached(repository: str, file_name: str, *, revision: str | None, local_files_only: bool = False) -> str:
        assert (repository, revision, local_files_only) == ("clinic/encoder", "v2", True)
        return str(tmp_path / file_name)

    monkeypatch.setattr(weights_module, "hf_hub_download", cached)
    info = load_backbone("hf-hub:clinic/encoder@v2").info
    assert info.name == "hf-hub:clinic/encoder@v2"
    assert info.mean == (0.1, 0.2, 0.3)
    assert info.weights == load_backbone("test_vit", weights=tiny_weights).info.weights


def test_a_hub_repository_without_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Listing:
        siblings: list[Any]

    monkeypatch.setattr(weights_module, "hf_hub_download", absent)
    monkeypatch.setattr(weights_module.HfApi, "model_info", lambda *_args, **_options: Listing([]))
    with pytest.raises(
        BackboneError, match=r"timm/test_vit.r160_in1k holds none of model.safetensors, pytorch_model.bin"
    ):
        load_backbone("test_vit")


def test_models_without_published_weights_ask_for_a_file() -> None:
    with pytest.raises(BackboneError, match="timm publishes no weights for vit_giant_patch14_224; pass --weights FILE"):
        load_backbone("vit_giant_patch14_224")


def test_recommended_backbones_are_known_to_timm_and_start_with_the_built_in_one() -> None:
    notes = list_backbones()
    assert notes[0].name == "embedkit/scattering"
    assert not notes[0].download
    for note in notes[1:]:
        assert note.name in timm.list_pretrained(), note.name
        assert note.download and note.licence and note.what


def test_channels_and_weights_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="asked for 2 channels; images have 1 or 3"):
        load_backbone("test_vit", channels=2)
    with pytest.raises(BackboneError, match=r"has no learned weights, but .* was given; leave --weights out"):
        load_backbone("embedkit/scattering", weights=tmp_path / "some.pth")


@pytest.mark.realdata
def test_real_weights_reproduce_timm_and_survive_bf16(deit_weights: Path) -> None:
    backbone = load_backbone("deit_tiny_patch16_224", weights=deit_weights)
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(deit_weights))
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (backbone.info.mean, backbone.info.std))
    with torch.inference_mode():
        expected = model.eval().forward_features((images - mean) / std)
        exact = backbone.forward_layers(images, [8, 12]).layers
        with torch.autocast("cpu", torch.bfloat16):
            rough = backbone.forward_layers(images, [12]).layers[12]
        stored = torch.as_tensor(exact[8].sequence).half()
        ended = backbone.run_tail(stored, 8)
    assert exact[12].summary is not None and rough.summary is not None and ended.summary is not None
    torch.testing.assert_close(exact[12].summary, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert float(torch.cosine_similarity(exact[12].summary, rough.summary.float()).min()) > 0.99
    torch.testing.assert_close(ended.summary, exact[12].summary, atol=2e-2, rtol=2e-2)


def test_compiled_blocks_give_the_tokens_of_plain_ones(images: Tensor) -> None:
    plain, compiled = make("plain"), make("plain")
    compiled.model.load_state_dict(plain.model.state_dict())
    compile_backbone(compiled)
    with torch.inference_mode():
        given = compiled.forward_layers(images, [1, plain.info.depth]).layers
        wanted = plain.forward_layers(images, [1, plain.info.depth]).layers
    for layer, tokens in wanted.items():
        torch.testing.assert_close(given[layer].patches, tokens.patches, rtol=1e-4, atol=1e-4)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= counted < compiled.info.depth * 2, "blocks share what was compiled"


def test_a_compiler_that_is_missing_or_wrong_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make("plain")
    recipe = make_recipe(backbone.info, tokens=["cls"], precision="fp32+compile", window="range:0:1")

    real, calls = backbone.forward_layers, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("InvalidCxxCompiler: no g++\nand much more")
        return real(*arguments, **options)

    monkeypatch.setattr(backbone, "forward_layers", broken)
    with pytest.raises(BackboneError, match=r"cannot be compiled here \(RuntimeError: Inv.*no g\+\+\); leave --comp"):
        require_compiled(backbone, recipe, torch.device("cpu"), batch_size=2)


def test_a_backbone_without_blocks_cannot_be_compiled() -> None:
    with pytest.raises(BackboneError, match="scattering has no transformer blocks to compile; leave --compile"):
        compile_backbone(load_backbone("embedkit/scattering", image_size=32))
