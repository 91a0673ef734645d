"""princeton-vl's RAFT files: names, shapes, and the oddities of how they were saved."""

import pytest
import torch

from stablevsr.architectures import RAFT_LARGE, RAFT_SMALL
from stablevsr.convert.keys import merge_princeton_names, princeton_raft, rename_all
from stablevsr.errors import WeightsError
from stablevsr.nn.raft import RAFT


class Layout(dict):
    """Names and shapes of a file, found by walking through the original classes in their order."""

    def conv(self, name, narrow, wide, *kernel):
        height, width = kernel if len(kernel) == 2 else (*kernel, *kernel)
        self[f"{name}.weight"], self[f"{name}.bias"] = (wide, narrow, height, width), (wide,)

    def batch_norm(self, name, width):
        for member in ("weight", "bias", "running_mean", "running_var"):
            self[f"{name}.{member}"] = (width,)
        self[f"{name}.num_batches_tracked"] = ()

    def residual_block(self, name, narrow, wide, batch_norm, stride):
        self.conv(f"{name}.conv1", narrow, wide, 3)
        self.conv(f"{name}.conv2", wide, wide, 3)
        if stride > 1:
            self.conv(f"{name}.downsample.0", narrow, wide, 1)
        if batch_norm:
            norms = ("norm1", "norm2", "norm3", "downsample.1") if stride > 1 else ("norm1", "norm2")
            for norm in norms:
                self.batch_norm(f"{name}.{norm}", wide)

    def bottleneck_block(self, name, narrow, wide, batch_norm, stride):
        assert not batch_norm
        self.conv(f"{name}.conv1", narrow, wide // 4, 1)
        self.conv(f"{name}.conv2", wide // 4, wide // 4, 3)
        self.conv(f"{name}.conv3", wide // 4, wide, 1)
        if stride > 1:
            self.conv(f"{name}.downsample.0", narrow, wide, 1)

    def encoder(self, name, block, stem, stages, out, batch_norm):
        if batch_norm:
            self.batch_norm(f"{name}.norm1", stem)
        self.conv(f"{name}.conv1", 3, stem, 7)
        width = stem
        for number, (wide, stride) in enumerate(zip(stages, (1, 2, 2), strict=True), 1):
            block(f"{name}.layer{number}.0", width, wide, batch_norm, stride)
            block(f"{name}.layer{number}.1", wide, wide, batch_norm, 1)
            width = wide
        self.conv(f"{name}.conv2", width, out, 1)

    def flow_head(self, hidden, wide):
        self.conv("update_block.flow_head.conv1", hidden, wide, 3)
        self.conv("update_block.flow_head.conv2", wide, 2, 3)


def large_layout():
    names = Layout()
    names.encoder("fnet", names.residual_block, 64, (64, 96, 128), 256, batch_norm=False)
    names.encoder("cnet", names.residual_block, 64, (64, 96, 128), 256, batch_norm=True)
    encoder = "update_block.encoder"
    names.conv(f"{encoder}.convc1", 4 * 9 * 9, 256, 1)
    names.conv(f"{encoder}.convc2", 256, 192, 3)
    names.conv(f"{encoder}.convf1", 2, 128, 7)
    names.conv(f"{encoder}.convf2", 128, 64, 3)
    names.conv(f"{encoder}.conv", 64 + 192, 126, 3)
    for number, kernel in ((1, (1, 5)), (2, (5, 1))):
        for gate in "zrq":
            names.conv(f"update_block.gru.conv{gate}{number}", 128 + 256, 128, *kernel)
    names.flow_head(128, 256)
    names.conv("update_block.mask.0", 128, 256, 3)
    names.conv("update_block.mask.2", 256, 64 * 9, 1)
    return names


def small_layout():
    names = Layout()
    names.encoder("fnet", names.bottleneck_block, 32, (32, 64, 96), 128, batch_norm=False)
    names.encoder("cnet", names.bottleneck_block, 32, (32, 64, 96), 96 + 64, batch_norm=False)
    encoder = "update_block.encoder"
    names.conv(f"{encoder}.convc1", 4 * 7 * 7, 96, 1)
    names.conv(f"{encoder}.convf1", 2, 64, 7)
    names.conv(f"{encoder}.convf2", 64, 32, 3)
    names.conv(f"{encoder}.conv", 128, 80, 3)
    for gate in "zrq":
        names.conv(f"update_block.gru.conv{gate}", 96 + 82 + 64, 96, 3)
    names.flow_head(96, 128)
    return names


SIZES = {"large": (RAFT_LARGE, large_layout), "small": (RAFT_SMALL, small_layout)}

# Ours and theirs, where two tensors of one shape could be confused.
PAIRS = {
    "large": {
        "fnet.stem.conv.weight": "fnet.conv1.weight",
        "cnet.stem.norm.running_var": "cnet.norm1.running_var",
        "fnet.blocks.0.convs.0.conv.weight": "fnet.layer1.0.conv1.weight",
        "fnet.blocks.0.convs.1.conv.weight": "fnet.layer1.0.conv2.weight",
        "fnet.blocks.1.convs.0.conv.weight": "fnet.layer1.1.conv1.weight",
        "cnet.blocks.1.convs.1.conv.weight": "cnet.layer1.1.conv2.weight",
        "cnet.blocks.2.convs.0.norm.bias": "cnet.layer2.0.norm1.bias",
        "cnet.blocks.2.convs.1.norm.bias": "cnet.layer2.0.norm2.bias",
        "cnet.blocks.2.skip.norm.bias": "cnet.layer2.0.downsample.1.bias",
        "cnet.blocks.5.convs.1.norm.num_batches_tracked": "cnet.layer3.1.norm2.num_batches_tracked",
        "cnet.blocks.4.skip.conv.bias": "cnet.layer3.0.downsample.0.bias",
        "fnet.conv_out.weight": "fnet.conv2.weight",
        "motion_encoder.corr_convs.1.weight": "update_block.encoder.convc2.weight",
        "motion_encoder.flow_convs.0.weight": "update_block.encoder.convf1.weight",
        "motion_encoder.conv_out.weight": "update_block.encoder.conv.weight",
        "grus.0.conv_z.weight": "update_block.gru.convz1.weight",
        "grus.0.conv_r.weight": "update_block.gru.convr1.weight",
        "grus.0.conv_q.weight": "update_block.gru.convq1.weight",
        "grus.1.conv_z.bias": "update_block.gru.convz2.bias",
        "flow_head.2.weight": "update_block.flow_head.conv2.weight",
        "mask_head.0.bias": "update_block.mask.0.bias",
    },
    "small": {
        "fnet.stem.conv.weight": "fnet.conv1.weight",
        "fnet.blocks.3.convs.0.conv.bias": "fnet.layer2.1.conv1.bias",
        "fnet.blocks.3.convs.1.conv.bias": "fnet.layer2.1.conv2.bias",
        "cnet.blocks.3.convs.2.conv.bias": "cnet.layer2.1.conv3.bias",
        "cnet.blocks.4.skip.conv.bias": "cnet.layer3.0.downsample.0.bias",
        "cnet.conv_out.bias": "cnet.conv2.bias",
        "motion_encoder.flow_convs.1.weight": "update_block.encoder.convf2.weight",
        "grus.0.conv_z.bias": "update_block.gru.convz.bias",
        "grus.0.conv_r.bias": "update_block.gru.convr.bias",
        "grus.0.conv_q.bias": "update_block.gru.convq.bias",
        "flow_head.0.weight": "update_block.flow_head.conv1.weight",
    },
}


def random_file(size, prefix="module."):
    torch.manual_seed(0)
    file = {name: torch.randn(shape) for name, shape in SIZES[size][1]().items()}
    for name in file:  # one module, registered twice
        file[name] = file[name.replace(".norm3.", ".downsample.1.")]
    return {prefix + name: tensor for name, tensor in file.items()}


def convert(file, config):
    with torch.device("meta"):
        network = RAFT(config)
    merged = merge_princeton_names(file, config, "raft.pth")
    names = rename_all(network.state_dict(), princeton_raft(config))
    assert set(names.values()) == set(merged)
    network.load_state_dict({ours: merged[theirs] for ours, theirs in names.items()}, strict=True, assign=True)
    return network


def test_layouts_have_the_published_sizes():
    assert len(large_layout()) == 179  # tensors in raft-things.pth
    not_counted = ("running_mean", "running_var", "num_batches_tracked")
    for size, parameters in (("large", 5_257_536), ("small", 990_162)):
        shapes = {name: shape for name, shape in SIZES[size][1]().items() if ".norm3." not in name}
        counts = [torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith(not_counted)]
        assert sum(counts) == parameters


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_finds_its_place_to_the_bit(size, prefix):
    file = random_file(size, prefix)
    state = convert(file, SIZES[size][0]).state_dict()
    for ours, theirs in PAIRS[size].items():
        assert torch.equal(state[ours], file[prefix + theirs]), ours
    places = {tensor.data_ptr() for tensor in state.values()}
    assert len(places) == len(state)
    assert places == {tensor.data_ptr() for tensor in file.values()}


@pytest.mark.parametrize("dropped", [".norm3.", ".downsample.1."])
def test_one_name_of_a_doubled_norm_is_enough(dropped):
    file = random_file("large")
    expected = convert(file, RAFT_LARGE).state_dict()
    state = convert({name: tensor for name, tensor in file.items() if dropped not in name}, RAFT_LARGE).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_doubled_norms_that_differ_are_refused():
    file = random_file("large")
    name = "module.cnet.layer3.0.norm3.running_mean"
    file[name] = file[name] + 1e-6
    with pytest.raises(WeightsError, match=r"raft\.pth: .*layer3\.0\.(norm3|downsample\.1)\.running_mean differs"):
        merge_princeton_names(file, RAFT_LARGE, "raft.pth")
