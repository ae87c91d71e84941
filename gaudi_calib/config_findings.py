"""What a check of a QUANT_CONFIG finds, and how it travels through pydantic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing to know about a QUANT_CONFIG.

    Attributes:
        where: the attribute concerned (dotted where it is nested).
        what: what is wrong, or what INC does with it.
        why: the reason.
        fix: what to write instead.
    """

    where: str
    what: str
    why: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        rows = [("where", self.where), ("why", self.why), ("fix", self.fix)]
        return "\n".join([self.what] + [f"  {name + ':':<6} {text}" for name, text in rows if text])


class RuleError(ValueError):
    """A config breaks rules; carries every finding through pydantic."""

    def __init__(self, findings: list[Finding]):
        super().__init__("; ".join(finding.what for finding in findings))
        self.findings = findings
