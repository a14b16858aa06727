"""What it is worth: fair timing, the cost model's prediction, draft vocabularies."""

from pathlib import Path


def prompt_file() -> Path:
    """Name the file of the ten built-in prompts (ours; JSON lines)."""
    return Path(__file__).parent / "prompts.jsonl"
