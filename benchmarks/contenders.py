"""What the names of contenders say: whose they are, how they run, and what each is fairly held against."""

from collections.abc import Iterable

OURS, FUSED, FLOOR = "peft-ops", "peft-ops fused", "nn.Linear"
COMPILED, GRAPH = " compiled", " (graph)"
FOREIGN = ("PEFT", "bitsandbytes", "Liger", "TRL", "cut-cross-entropy")
# Not peers: what a layer costs without an adapter, or another method altogether.
REFERENCES = {FLOOR, FLOOR + GRAPH, "LoRA", "SDPA without prefix", "full fine-tuning"}


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def is_foreign(name: str) -> bool:
    """Code of other projects: where it fails, the contender is left out by name and the suite goes on."""
    return any(project in name for project in FOREIGN)


def is_peer(name: str) -> bool:
    return not is_ours(name) and name not in REFERENCES


def counterpart(name: str, present: Iterable[str]) -> str | None:
    """Ours among `present` that runs as `name` does: a CUDA graph against a graph, otherwise the plain layer."""
    ours = OURS + GRAPH if name.endswith(GRAPH) else OURS
    return next((candidate for candidate in (ours, FUSED, OURS) if candidate in present), None)
