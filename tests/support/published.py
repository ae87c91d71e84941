"""Settings of published QUANT_CONFIG files: `golden/quant_configs`."""

import json
from typing import Any

from tests.support.paths import GOLDEN


def read_published() -> list[dict[str, Any]]:
    """Return the rows, as VERSION.md there describes them."""
    text = (GOLDEN / "quant_configs" / "published.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
