"""Published folders to our file and back, and everything that can be wrong with them."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from models import DATA, TINY, random_model, with_noise_levels
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from stablevsr import weights
from stablevsr.architectures import SD_X4_UPSCALER, STABLEVSR
from stablevsr.config import ModelConfig, TextConfig, from_dict, to_dict
from stablevsr.convert import published_config as published
from stablevsr.convert.assemble import Sources, convert, describe, to_diffusers
from stablevsr.convert.keys import DIFFUSERS_VAE, DIFFUSERS_VAE_OLD, rename_all
from stablevsr.errors import OptionsError, ResourceError, WeightsError
from stablevsr.model import build_model
from stablevsr.nn.vae import VAE

CHECKPOINT = DATA / "checkpoint"
FLOW = DATA / "golden/raft_small.pth"
PARTS = {"unet": "diffusion_pytorch_model", "controlnet": "diffusion_pytorch_model"}
PARTS |= {"vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint to spoil."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def part_file(folder: Path, part: str) -> Path:
    return folder / part / f"{PARTS[part]}.safetensors"


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_bits(ours: Path, theirs: Path) -> None:
    ours_, theirs_ = load_file(ours), load_file(theirs)
    assert set(ours_) == set(theirs_)
    for name, tensor in theirs_.items():
        assert tensor.dtype == ours_[name].dtype
        assert torch.equal(tensor, ours_[name]), name


def test_round_trip_same_keys_same_bits(golden_weights: Path, tmp_path: Path) -> None:
    written = to_diffusers(golden_weights, tmp_path / "back")
    assert written == ["unet", "controlnet", "vae", "scheduler", "text_encoder", "tokenizer"]
    for part in PARTS:
        assert_same_bits(part_file(tmp_path / "back", part), part_file(CHECKPOINT, part))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "back/tokenizer" / name).read_text() == (CHECKPOINT / "tokenizer" / name).read_text()


def test_libraries_open_what_we_write_back(golden_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "back"
    to_diffusers(golden_weights, folder)
    for library, part in ((UNet2DConditionModel, "unet"), (ControlNetModel, "controlnet"), (AutoencoderKL, "vae")):
        network, report = library.from_pretrained(folder, subfolder=part, output_loading_info=True)
        assert not any(report.values()), report
        original = library.from_pretrained(CHECKPOINT, subfolder=part)
        same = {key: value for key, value in original.config.items() if not key.startswith("_")}
        same.pop("sample_size", None)  # says what the training pictures were, nothing of the network
        for key, value in same.items():
            ours = network.config[key]
            assert ours == value or ours == [value] * 4, key
    CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")


def test_without_text_the_file_holds_the_empty_prompt_only(golden_weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    convert(Sources(CHECKPOINT, FLOW), path)
    bare, full = build_model(path), build_model(golden_weights)
    assert bare.text is None
    assert torch.equal(bare.encode_prompt(None), full.encode_prompt(None))
    assert torch.equal(bare.encode_prompt(None), full.text(torch.tensor([full.tokenizer.empty()])))
    assert "absent" in describe(path)
    assert to_diffusers(path, tmp_path / "back") == ["unet", "controlnet", "vae", "scheduler"]


def test_bin_shards_variants_and_old_names_give_the_same_model(golden_weights: Path, folder: Path) -> None:
    # the UNet as a pickle, the TCM in two shards with an index, the text tower as fp16 variant, old names in the VAE
    unet = part_file(folder, "unet")
    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.unlink()
    tcm = part_file(folder, "controlnet")
    tensors = list(load_file(tcm).items())
    tcm.unlink()
    shards = {"a.safetensors": dict(tensors[:100]), "b.safetensors": dict(tensors[100:])}
    for name, part in shards.items():
        save_file(part, tcm.parent / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    (tcm.parent / f"{tcm.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = part_file(folder, "text_encoder")
    text.rename(text.with_name("model.fp16.safetensors"))
    with torch.device("meta"):
        names = VAE(build_model(golden_weights).config.vae).state_dict()
    new, old = rename_all(names, DIFFUSERS_VAE), rename_all(names, DIFFUSERS_VAE_OLD)
    vae = load_file(part_file(folder, "vae"))
    save_file({old[name]: vae[new[name]].clone() for name in names}, part_file(folder, "vae"))
    assert any("mid_block.attentions.0.query" in name for name in old.values())

    path = folder / "converted.safetensors"
    convert(Sources(folder, FLOW, with_text=True), path)
    ours, expected = load_file(path), load_file(golden_weights)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    to_diffusers(path, folder / "back")
    assert_same_bits(part_file(folder / "back", "vae"), part_file(folder, "vae"))


def test_position_ids_and_bare_text_names_come_back(folder: Path, tmp_path: Path) -> None:
    text = part_file(folder, "text_encoder")
    tensors = {name.removeprefix("text_model."): tensor.clone() for name, tensor in load_file(text).items()}
    save_file({**tensors, "embeddings.position_ids": torch.arange(77)[None]}, text)
    convert(Sources(folder, with_text=True), tmp_path / "file.safetensors")
    to_diffusers(tmp_path / "file.safetensors", tmp_path / "back")
    assert_same_bits(part_file(tmp_path / "back", "text_encoder"), text)


def test_stock_folder_gets_a_tcm_from_its_unet(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "controlnet")
    path = tmp_path / "stock.safetensors"
    header = convert(Sources(folder, FLOW), path)
    assert header.provenance["tcm"] == "untrained: initialised from the unet, zero convolutions"
    model = build_model(path)
    for name, tensor in model.tcm.encoder.state_dict().items():
        assert torch.equal(tensor, model.unet.encoder.state_dict()[name]), name
    x = torch.randn(1, 7, 6, 5)
    added = model.tcm(x, torch.tensor([3]), model.encode_prompt(None), torch.randn(1, 3, 24, 20))
    assert all(not residual.any() for residual in (*added.skips, added.middle))


def test_noise_level_embedding_and_its_schedule_are_read(tmp_path: Path) -> None:
    model = random_model(with_noise_levels(TINY))
    path = tmp_path / "noise.safetensors"
    weights.write(path, weights.Header(model.config), model.state_dict())
    folder = tmp_path / "folder"
    assert "low_res_scheduler" in to_diffusers(path, folder)
    for part in ("text_encoder", "tokenizer"):  # of the right width
        shutil.copytree(CHECKPOINT / part, folder / part)
    convert(Sources(folder), tmp_path / "again.safetensors")
    again = build_model(tmp_path / "again.safetensors")
    assert again.config.low_res_schedule == model.config.low_res_schedule
    assert again.config.unet == model.config.unet
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, again.unet.state_dict()[name])


def test_a_tcm_goes_onto_a_base_file(golden_weights: Path, folder: Path, tmp_path: Path) -> None:
    def brighten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["controlnet_mid_block.bias"] += 1.0

    edit_tensors(part_file(folder, "controlnet"), brighten)
    path = tmp_path / "mine.safetensors"
    header = convert(Sources(golden_weights, tcm=folder / "controlnet", with_text=True), path)
    assert header.provenance["tcm"] == "diffusers, controlnet/diffusion_pytorch_model.safetensors"
    ours, base = load_file(path), load_file(golden_weights)
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {"tcm.zero_conv_middle.bias"}


def test_a_tiny_decoder_goes_onto_a_base_file(golden_weights: Path, tmp_path: Path) -> None:
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    library = AutoencoderTiny(**widths, num_encoder_blocks=(1, 3, 3), num_decoder_blocks=(3, 3, 1)).eval()
    library.save_pretrained(tmp_path / "taesd")
    path = tmp_path / "with_tiny.safetensors"
    header = convert(Sources(golden_weights, tiny=tmp_path / "taesd"), path)
    assert header.provenance["tiny"] == "diffusers, taesd/diffusion_pytorch_model.safetensors"
    latent = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(build_model(path, "cpu").tiny(latent), library.decode(latent).sample)
    edit_json(tmp_path / "taesd/config.json", scaling_factor=0.5)
    with pytest.raises(WeightsError, match="scaling_factor"):
        convert(Sources(golden_weights, tiny=tmp_path / "taesd"), path)


def test_dtype_is_converted_but_the_empty_prompt_is_not(tmp_path: Path) -> None:
    convert(Sources(CHECKPOINT, FLOW), tmp_path / "file.safetensors", torch.bfloat16)
    tensors = load_file(tmp_path / "file.safetensors")
    assert tensors.pop("empty_prompt").dtype == torch.float32
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [STABLEVSR, SD_X4_UPSCALER, TINY])
def test_configs_survive_json_and_the_published_layout(config: ModelConfig) -> None:
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert published.read_unet(published.write_unet(config.unet), "unet") == config.unet
    assert published.read_tcm(published.write_tcm(config.tcm), "tcm") == config.tcm
    assert published.read_vae(published.write_vae(config.vae), "vae") == config.vae
    assert published.read_schedule(published.write_schedule(config.schedule), "schedule") == config.schedule


def test_a_scheduler_of_another_class_gives_what_it_shares() -> None:
    ddim = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    ddim |= {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
    schedule = published.read_schedule(ddim, "scheduler")
    assert (schedule.beta_schedule, schedule.prediction_type) == ("scaled_linear", "v_prediction")
    assert (schedule.steps_offset, schedule.clip_sample) == (1, False)
    assert published.read_schedule({}, "scheduler").clip_sample


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"act_fn": "mish"}, r"unet/config.json: act_fn = 'mish' is not supported, only 'silu' or 'swish'"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}, "a block of type 'AttnDownBlock2D'"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "describes a UNet3DConditionModel, expected"),
        ("unet", {"cross_attention_dim": [32, 64, 32, 32]}, "cross_attention_dim"),
        ("unet", {"attention_head_dim": 5}, "does not divide into 5 heads"),
        ("unet", {"block_out_channels": [32, 32, 64]}, "expected one value or 3"),
        ("unet", {"block_out_channels": 5}, "unet/config.json holds a value of the wrong type"),
        ("unet", {"norm_num_groups": 0}, "norm_groups must be positive, got 0"),
        ("controlnet", {"global_pool_conditions": True}, "global_pool_conditions = True"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv = False"),
        ("vae", {"latent_channels": 8}, "vae/diffusion_pytorch_model.safetensors: .* has shape"),
        ("text_encoder", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type 'flow' is not supported"),
        ("scheduler", {"variance_type": "learned"}, "variance_type = 'learned' is not supported"),
    ],
)
def test_unsupported_configs_are_refused_by_name(folder: Path, part: str, changes: dict, message: str) -> None:
    edit_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    with pytest.raises(WeightsError, match=message):
        convert(Sources(folder), folder / "out.safetensors")
    assert leftovers(folder) == set()


def leftovers(folder: Path) -> set[str]:
    """What stands in the folder beside the parts of the checkpoint."""
    return {entry.name for entry in folder.iterdir()} - {entry.name for entry in CHECKPOINT.iterdir()}


class RunsCode:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pickle-ran-code"),))


def spoil_missing_file(folder: Path) -> None:
    part_file(folder, "vae").unlink()


def spoil_truncated(folder: Path) -> None:
    data = part_file(folder, "unet").read_bytes()
    part_file(folder, "unet").write_bytes(data[: len(data) // 2])


def spoil_missing_key(folder: Path) -> None:
    edit_tensors(part_file(folder, "unet"), lambda tensors: tensors.pop("conv_in.weight"))


def spoil_extra_key(folder: Path) -> None:
    edit_tensors(part_file(folder, "unet"), lambda tensors: tensors.update(surprise=torch.zeros(1)))


def spoil_shape(folder: Path) -> None:
    edit_tensors(part_file(folder, "unet"), lambda tensors: tensors.update({"conv_in.bias": torch.zeros(5)}))


def spoil_nan(folder: Path) -> None:
    edit_tensors(part_file(folder, "unet"), lambda tensors: tensors["conv_in.bias"].fill_(torch.nan))


def spoil_pickle(folder: Path) -> None:
    part_file(folder, "unet").unlink()
    with part_file(folder, "unet").with_suffix(".bin").open("wb") as file:
        pickle.dump({"conv_in.weight": RunsCode()}, file, protocol=2)


def spoil_json(folder: Path) -> None:
    (folder / "unet/config.json").write_text("{")


def spoil_json_depth(folder: Path) -> None:
    (folder / "unet/config.json").write_text("[" * 10**5)


def spoil_merges(folder: Path) -> None:
    (folder / "tokenizer/merges.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_file, "vae holds no weights: expected diffusion_pytorch_model.safetensors"),
        (spoil_truncated, "unet/diffusion_pytorch_model.safetensors is truncated"),
        (spoil_missing_key, "unet/diffusion_pytorch_model.safetensors lacks conv_in.weight"),
        (spoil_extra_key, "has unknown surprise"),
        (spoil_shape, r"conv_in.bias has shape \(5,\), expected \(32,\)"),
        (spoil_nan, "unet/diffusion_pytorch_model.safetensors: tensor conv_in.bias holds NaN"),
        (spoil_pickle, "would run code, which is refused"),
        (spoil_json, "unet/config.json is not valid JSON"),
        (spoil_json_depth, "unet/config.json is not valid JSON"),
        (spoil_merges, "merges.txt is missing"),
    ],
)
def test_spoilt_folders(
    folder: Path, spoil: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    spoil(folder)
    with pytest.raises(WeightsError, match=message):
        convert(Sources(folder, FLOW), folder / "out.safetensors")
    assert leftovers(folder) == set()
    assert not Path("pickle-ran-code").exists()


def test_a_flow_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"vae/diffusion_pytorch_model.safetensors holds no RAFT"):
        convert(Sources(CHECKPOINT, part_file(CHECKPOINT, "vae")), tmp_path / "out.safetensors")


def test_to_diffusers_does_not_touch_what_exists(golden_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionsError, match="mine already exists"):
        to_diffusers(golden_weights, tmp_path / "mine")


def test_to_diffusers_on_a_full_disk_leaves_nothing(
    golden_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stablevsr.convert.diffusers_folder.save_file", fail)
    with pytest.raises(ResourceError, match=r"back could not be written .*No space left on device"):
        to_diffusers(golden_weights, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_a_folder_or_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years")
    with pytest.raises(OptionsError, match="precious exists and is not a regular file"):
        convert(Sources(CHECKPOINT), tmp_path / "precious")
    assert (tmp_path / "precious/thesis.txt").read_text() == "years"


def test_files_have_the_default_permissions(golden_weights: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    to_diffusers(golden_weights, tmp_path / "back")
    for path in (golden_weights, part_file(tmp_path / "back", "unet")):
        assert path.stat().st_mode == plain.stat().st_mode


def test_a_value_that_does_not_fit_the_dtype_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_tensors(part_file(folder, "vae"), lambda t: t.update({"decoder.conv_out.bias": torch.full((3,), 1e6)}))
    with pytest.raises(
        OptionsError, match=r"tensor vae.decoder.conv_out.bias exceeds the range of float16: choose bf16 or fp32"
    ):
        convert(Sources(folder), tmp_path / "out.safetensors", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_vocabulary_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "tokenizer/vocab.json", more=530)
    with pytest.raises(WeightsError, match="a vocabulary of 531 tokens, the text encoder has 530"):
        convert(Sources(folder), tmp_path / "out.safetensors")


def test_a_weights_file_cannot_name_files_outside_its_folder(golden_weights: Path, tmp_path: Path) -> None:
    metadata = weights.read_header(golden_weights).to_metadata()
    metadata["tokenizer"] = json.dumps({"../../escaped.txt": "boo"})
    save_file(load_file(golden_weights), tmp_path / "evil.safetensors", metadata=metadata)
    with pytest.raises(WeightsError, match="tokenizer holds other files"):
        to_diffusers(tmp_path / "evil.safetensors", tmp_path / "back")


def test_the_original_single_file_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LDM to ours through the tool's own path, at a small size: same bits as the model it was laid out from."""
    config = replace(with_noise_levels(TINY), text=TextConfig(32, 64, 2, 4, vocab_size=49408))
    model = random_model(config)
    from stablevsr.convert import assemble, ldm

    monkeypatch.setattr(assemble, "SD_X4_UPSCALER", replace(config, text=None))
    monkeypatch.setattr(assemble, "TextConfig", lambda: config.text)
    published_names = {}
    for part, table in (("unet", ldm.ldm_unet(config.unet.encoder)), ("vae", ldm.ldm_vae(config.vae))):
        state = getattr(model, part).state_dict()
        published_names |= {theirs: state[ours] for ours, theirs in rename_all(state, table).items()}
    state, fused = model.text.state_dict(), {}
    for ours, theirs in rename_all(state, ldm.OPEN_CLIP_TEXT).items():
        if theirs.endswith("]"):
            fused.setdefault(theirs[:-3], {})[int(theirs[-2])] = state[ours]
        else:
            published_names[theirs] = state[ours]
    published_names |= {name: torch.cat([parts[i] for i in range(3)]) for name, parts in fused.items()}
    for name in list(published_names):
        if ".attn_1." in name and name.endswith("weight") and "norm" not in name:
            published_names[name] = published_names[name][..., None, None]
    for path in (tmp_path / "x4.safetensors", tmp_path / "x4.ckpt"):
        if path.suffix == ".ckpt":
            torch.save({"state_dict": published_names}, path)
        else:
            save_file({name: tensor.clone() for name, tensor in published_names.items()}, path)
        header = convert(Sources(path, FLOW), tmp_path / "ours.safetensors")
        assert header.provenance["unet"] == f"LDM, {path.name}"
        assert header.provenance["tcm"].startswith("untrained")
        ours = load_file(tmp_path / "ours.safetensors")
        for part in ("unet", "vae"):
            for name, tensor in getattr(model, part).state_dict().items():
                assert torch.equal(ours[f"{part}.{name}"], tensor), name
        empty = torch.tensor([[49406, 49407, *[0] * 75]])
        torch.testing.assert_close(ours["empty_prompt"][None], model.text(empty))
