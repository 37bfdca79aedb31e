"""All figures and a page of tables, drawn from the result files that are there."""

import json
from pathlib import Path

import plots_cost
import plots_quality

PAGES = (  # file, title, functions that draw it and put it into a table
    ("perplexity", "Perplexity", plots_quality.plot_perplexity, plots_quality.table_perplexity),
    ("passkey", "Passkeys found whole", plots_quality.plot_passkey, plots_quality.table_passkey),
    ("needles", "Three of ten needles", plots_quality.plot_needles, plots_quality.table_needles),
    ("short", "Short texts", None, plots_quality.table_short),
    ("ablations", "Ablations", None, plots_quality.table_ablations),
    ("cost", "Cost of reading", plots_cost.plot_cost, plots_cost.table_cost),
)


def draw_all(results: Path) -> Path:
    """Draw every figure whose results are there, and write ``README.md`` with all tables.

    Args:
        results: Folder of the JSON files; the figures go there too.

    Returns:
        The page.
    """
    parts = ["# Results of the reproduction", "Made by `plots.py` from the JSON files beside it."]
    for name, title, draw, tabulate in PAGES:
        file = results / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        parts += [f"## {title}", f"{found['what'].capitalize()}; `{found['command']}` on {found['machine']['device']}."]
        if draw is not None:
            parts.append(f"![{title}]({draw(results).name})")
        parts.append(tabulate(results))
    page = results / "README.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
