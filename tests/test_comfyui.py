"""The nodes for ComfyUI, against a stand-in of the few modules of ComfyUI that they use (see `comfyui_stand_in`).

That stand-in is ours: it shows that the nodes do their part, not that ComfyUI does its own. They have also been run
in ComfyUI itself, see integrations/comfyui/README.md.
"""

import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import comfyui_stand_in as stand_in
import numpy as np
import pytest
import torch
from clips_made import picture, write_video

from stablevsr import PRESETS, build_model, sample_video, upscale
from stablevsr.engine import store
from stablevsr.errors import OptionsError, WeightsError
from stablevsr.media import Encoding, open_reader

FOLDER = Path(__file__).parent.parent / "integrations/comfyui"


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> stand_in.ComfyUI:
    """ComfyUI's modules, as far as the nodes use them."""
    return stand_in.install(tmp_path, monkeypatch)


@pytest.fixture
def pack(comfy: stand_in.ComfyUI) -> Iterator[ModuleType]:
    """The node pack, loaded as ComfyUI loads a folder in custom_nodes."""
    spec = importlib.util.spec_from_file_location("stablevsr_nodes", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stablevsr_nodes"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "stablevsr_nodes"]:
        del sys.modules[name]


@pytest.fixture
def weights(comfy: stand_in.ComfyUI, tiny_weights: Path) -> str:
    """Weights in ComfyUI's model folder."""
    folder = comfy.models / "stablevsr"
    folder.mkdir(parents=True)
    (folder / "tiny.safetensors").write_bytes(tiny_weights.read_bytes())
    (folder / "notes.txt").write_text("not weights")
    return "tiny.safetensors"


def images(n: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        return torch.from_numpy(np.stack([picture(8, 12, index) for index in range(n)])).float() / 255


def run(pack: ModuleType, name: str, **inputs: object) -> object:
    """Run a node with these inputs and the defaults of its widgets, in inference mode, as ComfyUI does.

    Returns its only output.
    """
    node = pack.NODE_CLASS_MAPPINGS[name]
    values = {}
    for group in node.INPUT_TYPES().values():
        for each, (kind, *options) in group.items():
            if each not in inputs and options:
                values[each] = options[0]["default"]
                assert not isinstance(kind, list) or values[each] in kind
    with torch.inference_mode():
        (result,) = getattr(node(), node.FUNCTION)(**values | inputs)
    return result


def test_weights_are_found_by_name_and_by_file(pack: ModuleType, weights: str, tiny_weights: Path) -> None:
    choices = pack.NODE_CLASS_MAPPINGS["LoadStableVSR"].INPUT_TYPES()["required"]["weights"][0]
    assert choices == ["small model (bundled)", "tiny.safetensors"]
    by_name = run(pack, "LoadStableVSR", weights=weights)
    by_file = run(pack, "LoadStableVSR", file=f" {tiny_weights} ")
    for each in (by_name, by_file):
        assert each.model.sampling == PRESETS["exact"]
        assert each.model.provenance == {"note": "random"}
    assert run(pack, "LoadStableVSR").model.sampling == build_model(device="cpu").sampling
    with pytest.raises(WeightsError, match="nothing"):
        run(pack, "LoadStableVSR", file="nothing.safetensors")


def test_a_batch_is_upscaled_as_by_sample_video(pack: ModuleType, comfy: stand_in.ComfyUI, weights: str) -> None:
    model = run(pack, "LoadStableVSR", weights=weights)
    assert model.model.dtype == torch.float32  # "auto" on a CPU
    result = run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=2, seed=3, scene_cuts="1")
    direct = build_model(comfy.models / "stablevsr/tiny.safetensors", "cpu")
    frames = images().movedim(-1, 1).contiguous()
    expected = sample_video(direct, frames, steps=2, seed=3, scene_cuts=(1,))
    assert result.shape == (3, 32, 48, 3)
    assert torch.equal(result, expected.movedim(1, -1))
    assert comfy.loaded == [model.patcher]
    assert comfy.memory_required >= 1_400_000_000


def test_the_bar_moves_from_nothing_to_all(pack: ModuleType, comfy: stand_in.ComfyUI, weights: str) -> None:
    model = run(pack, "LoadStableVSR", weights=weights)
    run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=2)
    assert comfy.bar == [(done, 2 + 6 + 3) for done in range(1, 12)]
    comfy.bar.clear()
    run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=2, preset="streaming")
    assert comfy.bar == [(1, 3), (2, 3), (3, 3)]
    comfy.bar.clear()
    twice = run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=1, scale=5.0)
    assert twice.shape == (3, 40, 60, 3)
    assert comfy.bar == [(done, 2 * (2 + 3 + 3)) for done in range(1, 17)]


def test_an_interrupt_ends_the_work_at_once(pack: ModuleType, comfy: stand_in.ComfyUI, weights: str) -> None:
    model = run(pack, "LoadStableVSR", weights=weights)
    comfy.interrupt_at = 4
    with pytest.raises(stand_in.InterruptProcessingException):
        run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=50)
    assert len(comfy.bar) == 4


def test_options_are_checked_before_anything_is_moved(pack: ModuleType, comfy: stand_in.ComfyUI, weights: str) -> None:
    model = run(pack, "LoadStableVSR", weights=weights)
    for options in ({"prompt": "a cat"}, {"negative_prompt": "blur"}, {"scene_cuts": "9"}, {"tile": "3"}):
        with pytest.raises(OptionsError):
            run(pack, "StableVSRUpscaleVideo", model=model, images=images(), **options)
    with pytest.raises(OptionsError, match="offload saves GPU memory"):
        run(pack, "LoadStableVSR", weights=weights, offload=True)
    assert comfy.loaded == []


def test_widgets_become_fields(pack: ModuleType) -> None:
    fields_of = pack.nodes.fields_of
    assert fields_of({"scene_cuts": "48, 120", "tile": "64", "color_fix": "adain", "prompt": ""}) == {
        "scene_cuts": (48, 120),
        "tile": 64,
        "color_fix": "adain",
    }
    assert fields_of({"color_fix": "default"}) == {}
    assert fields_of({"scene_cuts": "auto", "tile": "off", "color_fix": "none"}) == {
        "scene_cuts": "auto",
        "tile": "off",
        "color_fix": "none",
    }


def test_a_file_is_streamed_interrupted_and_continued(
    pack: ModuleType,
    comfy: stand_in.ComfyUI,
    weights: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", 0)
    clip = write_video(tmp_path / "clip.mp4", [picture(16, 24, index) for index in range(4)], audio=0.1)
    model = run(pack, "LoadStableVSR", weights=weights)
    inputs = {"model": model, "video": stand_in.VideoFromFile(str(clip)), "steps": 2, "codec": "h264", "seed": 1}
    comfy.interrupt_at = 2
    with pytest.raises(stand_in.InterruptProcessingException):
        run(pack, "StableVSRStreamUpscale", **inputs)
    comfy.interrupt_at = 0
    with caplog.at_level("INFO", "stablevsr"):
        result = run(pack, "StableVSRStreamUpscale", **inputs)
    assert "continuing: 2 frames are done" in caplog.text
    path = Path(result.get_stream_source())
    assert path.parent == comfy.temporary
    direct = build_model(comfy.models / "stablevsr/tiny.safetensors", "cpu")
    config = PRESETS["streaming"].with_fields({"steps": 2, "seed": 1, "scene_cuts": "auto"})
    upscale(direct, clip, tmp_path / "direct.mp4", config, encoding=Encoding("h264", 12))
    with open_reader(path) as ours, open_reader(tmp_path / "direct.mp4") as expected:
        assert ours.has_audio
        pairs = list(zip(ours, expected, strict=True))
    assert len(pairs) == 4
    assert all(np.array_equal(a.image, b.image) for a, b in pairs)
    assert sorted(each.name for each in comfy.temporary.iterdir()) == [path.name]


def test_a_stream_keeps_color_fix_and_flow_of_the_weights(
    pack: ModuleType, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what these weights were trained with; the other options are those of streaming."""
    model, configs = run(pack, "LoadStableVSR", weights=weights), []
    model.model.sampling = replace(PRESETS["fast"], color_fix="backprojection")
    monkeypatch.setattr(pack.nodes, "upscale", lambda model, clip, output, config, **_: configs.append(config))
    clip = stand_in.VideoFromFile(str(write_video(tmp_path / "clip.mp4", [picture(16, 24, 0)])))
    for color_fix in ("default", "none"):
        run(pack, "StableVSRStreamUpscale", model=model, video=clip, codec="h264", color_fix=color_fix)
    assert [(each.mode, each.flow.half_size) for each in configs] == [("streaming", True)] * 2
    assert [each.color_fix for each in configs] == ["backprojection", None]


def test_a_video_that_is_no_whole_file_is_written_first(
    pack: ModuleType, comfy: stand_in.ComfyUI, tmp_path: Path
) -> None:
    clip = write_video(tmp_path / "clip.mp4", [picture(16, 24, index) for index in range(4)])
    assert pack.nodes.file_of(stand_in.VideoFromFile(str(clip))) == clip
    trimmed = pack.nodes.file_of(stand_in.VideoFromFile(str(clip), duration=0.05))
    assert trimmed.parent == comfy.temporary
    made = pack.nodes.file_of(stand_in.VideoFromImages(clip))
    assert made.read_bytes() == clip.read_bytes()


def test_offloading_frees_what_the_largest_network_needs(
    pack: ModuleType, comfy: stand_in.ComfyUI, tiny_model: object
) -> None:
    """Through the CPU, where offloading copies from memory to memory."""
    from models import offloaded

    model = pack.loading.LoadedModel(offloaded(tiny_model), None)
    result = run(pack, "StableVSRUpscaleVideo", model=model, images=images(), steps=1)
    assert result.shape == (3, 32, 48, 3)
    assert comfy.freed[0] > 1_400_000_000
    assert comfy.loaded == []
    assert not list(model.model._resident.parameters())


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code = (FOLDER / "__init__.py").read_text()
    with pytest.raises(ImportError, match="pip install stablevsr"):
        exec(compile(code, "__init__.py", "exec"), {"__name__": "nodes"})


def test_the_metadata_is_what_the_registry_expects() -> None:
    metadata = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert metadata["project"]["name"] == "stablevsr"
    assert metadata["project"]["dependencies"] == (FOLDER / "requirements.txt").read_text().split()
    assert metadata["tool"]["comfy"]["DisplayName"]
    assert set(metadata["tool"]["comfy"]) == {"PublisherId", "DisplayName", "Icon"}


@pytest.mark.parametrize("name", ["upscale_video", "stream_upscale"])
def test_the_example_workflows_fit_the_nodes(pack: ModuleType, name: str) -> None:
    """Every link and widget of our nodes; those of ComfyUI's own are theirs to define."""
    workflow = json.loads((FOLDER / f"example_workflows/{name}.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        assert nodes[origin]["outputs"][slot]["type"] == nodes[target]["inputs"][entry]["type"] == kind
    ours = [node for node in nodes.values() if node["type"] in pack.NODE_CLASS_MAPPINGS]
    assert len(ours) == 2
    for node in ours:
        cls = pack.NODE_CLASS_MAPPINGS[node["type"]]
        entries = {name: entry for group in cls.INPUT_TYPES().values() for name, entry in group.items()}
        sockets = [name for name, entry in entries.items() if entry[0] in ("IMAGE", "VIDEO", "STABLEVSR_MODEL")]
        assert [each["name"] for each in node["inputs"]] == sockets
        assert [each["type"] for each in node["outputs"]] == list(cls.RETURN_TYPES)
        values = iter(node["widgets_values"])
        for each in [each for each in entries if each not in sockets]:
            options = entries[each][1]
            assert next(values, options["default"]) == options["default"], each  # ComfyUI fills in what is missing
            if options.get("control_after_generate"):
                assert next(values) == "fixed"
        assert list(values) == []
