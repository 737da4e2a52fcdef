"""The table of targets by name, as `bash launch/fuzz.sh --only NAME` calls them."""

from tests.fuzz import (
    command_targets,
    file_targets,
    model_targets,
    picture_targets,
    response_targets,
    row_targets,
)
from tests.fuzz.target import Target

TARGETS: dict[str, type[Target]] = {
    "segments": response_targets.Segments,
    "strict": response_targets.Strict,
    "official": response_targets.Official,
    "mathematics": response_targets.Mathematics,
    "rows": row_targets.Rows,
    "json": row_targets.JsonFiles,
    "parquet": row_targets.ParquetFiles,
    "dataset_info": row_targets.DatasetInfo,
    "built": row_targets.BuiltFolders,
    "pictures": picture_targets.Pictures,
    "videos": picture_targets.Videos,
    "weights": model_targets.Weights,
    "configs": model_targets.Configs,
    "settings": model_targets.Settings,
    "tokenizers": model_targets.Tokenizers,
    "templates": model_targets.Templates,
    "run_folders": file_targets.RunFolders,
    "steps": file_targets.Steps,
    "manifests": file_targets.Manifests,
    "replies": file_targets.Replies,
    "waits": file_targets.Waits,
    "configurations": command_targets.Configurations,
    "commands": command_targets.Commands,
}
