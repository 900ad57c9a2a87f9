"""The profile: what a gate reads, what an edit does, and which model both belong to."""

from steerfast.profile.identity import ModelIdentity, embedding_sketch, sketched_rows
from steerfast.profile.profile import (
    EDITS,
    FORMAT_VERSION,
    GATE_KINDS,
    POOLINGS,
    POSITIONS,
    SCORES,
    Gate,
    SteeringProfile,
)

__all__ = [
    "EDITS",
    "FORMAT_VERSION",
    "GATE_KINDS",
    "POOLINGS",
    "POSITIONS",
    "SCORES",
    "Gate",
    "ModelIdentity",
    "SteeringProfile",
    "embedding_sketch",
    "sketched_rows",
]
