"""What a model on the hub consists of, and which of its files are needed."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from stablevsr.convert.checkpoint import choose_weights, shards_of
from stablevsr.errors import WeightsError
from stablevsr.hub.names import Name
from stablevsr.prompt import VOCABULARY_FILES

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "controlnet")
OPTIONAL = ("controlnet",)  # a stock upscaler has none
CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", "low_res_scheduler/scheduler_config.json")
READ = "the folders of StableVSR, Stream-DiffVSR or the SD x4 upscaler (unet, vae, text_encoder, tokenizer, scheduler)"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub.

    size: in bytes.
    sha256: of large files, which the hub states; None for small ones.
    blob: git's identifier of the content of small files, SHA-1 of a header and the content.
    """

    size: int
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit.

    license: as its page states it.
    kind: what its page says it is, such as the class of its pipeline.
    files: by path.
    """

    name: Name
    commit: str
    license: str = "not stated"
    kind: str = "no known pipeline"
    files: dict[str, RemoteFile] = field(default_factory=dict)

    def configs(self) -> list[str]:
        """The configuration files, a few kilobytes that tell whether this model is read.

        Raises:
            WeightsError: when folders are missing, saying what is there.
        """
        wanted = [f"{folder}/config.json" for folder in WITH_WEIGHTS]
        missing = [path for path in wanted if path not in self.files and path.split("/")[0] not in OPTIONAL]
        if missing or CONFIGS[1] not in self.files:
            raise WeightsError(f"{self.name} is of a kind that is not read ({self.kind}): expected {READ}")
        return [path for path in (*CONFIGS, *wanted) if path in self.files]

    def weights(self, variant: str | None = None) -> list[str]:
        """The files with weights and vocabulary: of several formats and precisions only the one that is read.

        Raises:
            WeightsError: when one is missing.
        """
        found = [f"tokenizer/{name}" for name in VOCABULARY_FILES if f"tokenizer/{name}" in self.files]
        for folder in WITH_WEIGHTS:
            if f"{folder}/config.json" in self.files:
                names = [PurePosixPath(path).name for path in self.files if str(PurePosixPath(path).parent) == folder]
                chosen = choose_weights(names, f"{self.name}: {folder}", variant)
                shards = shards_of(chosen, names) if chosen.endswith(".json") else []
                found += [f"{folder}/{name}" for name in (chosen, *shards)]
        return found

    def bytes(self, paths: list[str]) -> int:
        """The size of these files."""
        return sum(self.files[path].size for path in paths)
