"""What a manifest says about the data of a measurement."""

from gaudi_calib.data.prompts import Prompts
from gaudi_calib.data.sources import locate_dataset
from gaudi_calib.manifest import DatasetFacts, DatasetShare


def describe_dataset(prompts: Prompts) -> DatasetFacts:
    """Return the facts; a single dataset has no shares."""
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
