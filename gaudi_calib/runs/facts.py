"""What the manifest of a run says about its model and its data."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.data.prompts import Prompts
from gaudi_calib.data.sources import locate_dataset
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ModelError
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


def require_same_model(place: CalibrationDir, model: ModelFacts, world: int | None = None) -> None:
    """Check that the ranges in `place` were measured on the weights of `model`, as far as the manifest knows.

    Args:
        world: ranks to measure with again; None: as they were.

    Raises:
        ModelError: they were measured on others.
    """
    origin = place.origin
    before = origin.model if origin else None
    if origin is None or before is None or before.fingerprint in (None, model.fingerprint):
        return
    again = place.advise(model.name).measure(world or origin.measured_world or 1)
    raise ModelError(
        f"the ranges in {place.path.name} were measured on another checkpoint",
        where=place.path,
        why=f"the fingerprint of {model.name!r} is not that of {before.name!r} when it was measured",
        fix=f"give the model that was measured (-m {shlex.quote(before.name)})"
        if before.name != model.name
        else f"measure it again: {again}",
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
