"""What the manifest of a run says about its model and its data."""

from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.data.prompts import Prompts
from gaudi_calib.data.sources import locate_dataset
from gaudi_calib.manifest import DatasetFacts, DatasetShare, ModelFacts
from gaudi_calib.models.fingerprint import fingerprint_model

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan


def describe_model(name: str, plan: "ModelPlan") -> ModelFacts:
    """Return what is told of a model that was given as `name`; a directory is told by its absolute path."""
    directory = plan.checkpoint.directory
    return ModelFacts(
        name=str(directory) if Path(name).is_dir() else name,
        fingerprint=fingerprint_model(directory),
        model_type=plan.checkpoint.source.model_type,
        family=plan.family.name,
    )


def describe_dataset(prompts: Prompts) -> DatasetFacts:
    """Return what is told of the data of a measurement; a single dataset has no shares."""
    shares = [
        DatasetShare(
            name=locate_dataset(part.dataset.name),
            weight=part.dataset.weight,
            prompts=part.prompts,
            tokens=part.tokens,
        )
        for part in prompts.parts
    ]
    return DatasetFacts(
        name=shares[0].name if len(shares) == 1 else prompts.dataset,
        hash=prompts.sha256,
        prompts=len(prompts),
        tokens=prompts.token_count,
        skipped=prompts.skipped,
        shares=shares if len(shares) > 1 else [],
    )
