"""Writes the tables of docs/models.md: what comes of every causal model of transformers on a mesh.

Run it when transformers or the refusals change: python tools/write_models_table.py (a minute).
"""

import sys
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
START = "<!-- by tools/write_models_table.py -->"
END = "<!-- end -->"


def main() -> None:
    """Run the sweep and write the page."""
    from ranks import Ranks

    ranks = Ranks()  # forks: before any tensor work
    import torch
    from test_model_sweep import LIMIT, PAGE, TRIED, reason, sweep
    from tiny_models import NOT_TRIED
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[str]] = defaultdict(list)
    for kind in TRIED:
        outcome = sweep(ranks, kind)
        if outcome.refusal is None:
            key = "right" if outcome.worst <= LIMIT else f"WRONG, by {outcome.worst:.1e}"
        else:
            key = reason(outcome.refusal, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
        found[key].append(kind)
        print(f"{kind:<28} {key}")
    ranks.close()
    lines = ["| outcome | model types |", "|---|---|"]
    for key, kinds in sorted(found.items(), key=lambda item: (item[0] != "right", -len(item[1]))):
        lines.append(f"| {key} | {', '.join(f'`{kind}`' for kind in kinds)} |")
    lines += ["", "Not tried, as no tiny one can be built from sizes alone:", ""]
    lines += [f"- `{kind}`: {why}" for kind, why in NOT_TRIED.items()]
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
