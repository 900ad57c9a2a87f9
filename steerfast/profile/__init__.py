"""The profile: what a gate reads, what an edit does, and which model both belong to."""

from steerfast.kernels.edit_kinds import EDITS, Edit
from steerfast.profile.file import FORMAT_VERSION
from steerfast.profile.gate import GATE_KINDS, POOLINGS, SCORES, Gate, last_turn
from steerfast.profile.identity import ModelIdentity, embedding_sketch, sketched_rows
from steerfast.profile.profile import POSITIONS, SteeringProfile
from steerfast.profile.stack import ProfileStack

__all__ = [
    "EDITS",
    "FORMAT_VERSION",
    "GATE_KINDS",
    "POOLINGS",
    "POSITIONS",
    "SCORES",
    "Edit",
    "Gate",
    "ModelIdentity",
    "ProfileStack",
    "SteeringProfile",
    "embedding_sketch",
    "last_turn",
    "sketched_rows",
]
