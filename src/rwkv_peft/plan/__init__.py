"""A memory plan: what a run needs of the GPU, of RAM and of the disk, before anything is loaded.

`weights` counts parameters, `activations` what layers keep, `memory` puts them together, `fitting` looks for settings
that fit, `command` is what a user sees. All work on a model without values, made from the header of its file.
"""

from __future__ import annotations

from .cards import Card, card_here
from .command import run_plan
from .fitting import Proposal, advice, proposals
from .memory import Outline, Plan, plan, ram_warning

__all__ = [
    "Card", "Outline", "Plan", "Proposal", "advice", "card_here", "plan", "proposals", "ram_warning", "run_plan",
]  # fmt: skip
