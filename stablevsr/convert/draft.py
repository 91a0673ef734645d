"""A model under assembly, before it becomes a weights file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from stablevsr.config import (
    FlowConfig,
    ModelConfig,
    ScheduleConfig,
    TCMConfig,
    TemporalTinyConfig,
    TextConfig,
    TinyDecoderConfig,
    UNetConfig,
    VAEConfig,
)
from stablevsr.convert.keys import Table, rename_all
from stablevsr.nn.tcm import starting_state
from stablevsr.nn.text import TextEncoder
from stablevsr.sampling.config import SamplingConfig
from stablevsr.weights import Header, check_finite, check_tensors

# Fields shared by a draft and `ModelConfig`; context_tokens is known only at the end.
_CONFIGURED = [each.name for each in fields(ModelConfig) if each.name != "context_tokens"]


@dataclass
class Draft:
    """The parts read so far. `tensors` has a dictionary for each part, by our parameter names."""

    unet: UNetConfig
    vae: VAEConfig | TemporalTinyConfig
    schedule: ScheduleConfig
    low_res_schedule: ScheduleConfig | None = None
    max_noise_level: int = 350
    tcm: TCMConfig | None = None
    flow: FlowConfig | None = None
    tiny: TinyDecoderConfig | None = None
    text: TextConfig | None = None
    tokenizer: dict[str, str] | None = None
    empty_prompt: Tensor | None = None  # (tokens, width) float32
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    naming: dict[str, str] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def from_config(cls, config: ModelConfig) -> "Draft":
        """A draft with the configuration of all parts, without tensors."""
        return cls(**{name: getattr(config, name) for name in _CONFIGURED})

    def drop_text(self) -> None:
        """Drop the text tower; the empty prompt's embedding stays."""
        self.text = self.tokenizer = None
        for collection in (self.tensors, self.provenance):
            collection.pop("text", None)

    def finish(self) -> tuple[Header, dict[str, Tensor]]:
        """The header and the tensors of the weights file."""
        assert self.tcm is not None
        assert self.empty_prompt is not None
        configured = {name: getattr(self, name) for name in _CONFIGURED}
        config = ModelConfig(**configured, context_tokens=self.empty_prompt.shape[0])
        tensors = {f"{part}.{name}": tensor for part, names in self.tensors.items() for name, tensor in names.items()}
        tensors["empty_prompt"] = self.empty_prompt
        return Header(config, self.provenance, self.naming, self.tokenizer, self.sampling), tensors


def on_meta(network: Callable[..., nn.Module], config: object) -> dict[str, Tensor]:
    """The names and shapes of a network's parameters, on the meta device."""
    with torch.device("meta"):
        return network(config).state_dict()


def to_ours(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], table: Table, source: str
) -> dict[str, Tensor]:
    """Published tensors under our names: exactly those of `expected`, all finite, else `WeightsError` with the key."""
    names = rename_all(expected, table)
    check_tensors(published, {names[ours]: tensor for ours, tensor in expected.items()}, source)
    check_finite(published, source)
    return {ours: published[theirs] for ours, theirs in names.items()}


def tcm_from_unet(draft: Draft) -> None:
    """Give a stock upscaler the initial TCM for training."""
    draft.tcm = TCMConfig(draft.unet.encoder)
    draft.tensors["tcm"] = starting_state(draft.tcm, draft.tensors["unet"])
    draft.provenance["tcm"] = "untrained: initialised from the unet, zero convolutions"


def embed_empty_prompt(draft: Draft, tokens: Sequence[int]) -> None:
    """Compute the embedding of the empty prompt's `tokens` in float32, so that the tower can be dropped."""
    assert draft.text is not None
    with torch.device("meta"):
        tower = TextEncoder(draft.text)
    tower.load_state_dict({name: t.float() for name, t in draft.tensors["text"].items()}, assign=True)
    with torch.no_grad():
        draft.empty_prompt = tower(torch.tensor([list(tokens)]))[0].clone()
