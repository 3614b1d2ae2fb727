"""Names of settings, methods and metrics in tables and figures."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

SCENARIOS = {
    "aligned": "Every row complete; clients differ only in which rows they have",
    "missing": "Rows lose modalities at random",
    "cross": "Clients see different modalities, most often one each",
    "hybrid": "Each client keeps each modality with some probability",
}
AS_THEY_ARE = "rows as they are"  # of data with real gaps, which are never called complete
GROUPS = {  # scenario -> its name on the first screen
    "aligned": "Complete rows",
    "missing": "Random rows lack a modality",
    "hybrid": "Mixed sites",
    "cross": "Sites with one modality",
}
_METHODS = {
    "zero-shot": "Zero-shot",
    "majority": "Majority",
    "question-prior": "Question prior",
    "local": "Local",
    "centralised": "Centralised",
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedadagrad": "FedAdagrad",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
}
METRIC_LABELS = {
    "auc": "AUC",
    "auc_hard": "AUC of hard labels",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "accuracy_open": "accuracy, open",
    "accuracy_closed": "accuracy, closed",
    "token_f1": "token F1",
}
VISIBLE = {"both": "text and image", "all": "everything", "image": "image only", "text": "text only", "none": "nothing"}
TWO = ("image", "text")  # modalities of the published settings


def setting_label(settings: Mapping[str, Any]) -> str:
    """The published names of the twelve settings; others as key=value."""
    scenario, partition = settings["scenario"], settings["partition"]
    name = scenario["name"]
    if name == "aligned":
        return f"alpha {partition['alpha']:g}" if "alpha" in partition else partition["name"]
    if name == "missing" and not scenario.get("rates"):
        return f"beta {100 * scenario['rate']:g} %"
    if name == "cross" and not scenario.get("clients"):
        images = scenario["num_image_clients"]
        return f"I{images}:T{partition['num_clients'] - images}" if "num_clients" in partition else f"I{images}"
    if name == "hybrid":
        return f"p {100 * scenario['keep_rate']:g} %"
    if name == "cross":
        return f"cross {_listed(scenario['clients'])}"
    if name == "missing":
        return (
            f"beta {100 * scenario['rate']:g} %, {_listed({m: f'{100 * r:g} %' for m, r in scenario['rates'].items()})}"
        )
    words = [f"{k}={v}" for k, v in scenario.items() if k != "name" and v]
    return " ".join([name, *words])


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{modality} {value}" for modality, value in values.items())


def scenario_label(scenario: str, gaps: bool = False) -> str:
    """Return the scenario's name in tables; where rows lack something by themselves, "rows as they are" for "aligned"."""
    return AS_THEY_ARE if gaps and scenario == "aligned" else scenario


def visible_label(visible: str, gaps: bool = False) -> str:
    """Return the visible modalities of test rows in words: "labs only", "image, text and labs", "everything but genes".

    Args:
        visible: As in `evaluate.visible`.
        gaps: Whether the rows lack modalities by themselves: then no row is said to show everything.
    """
    if gaps and visible == "all":
        return AS_THEY_ARE
    if gaps and visible.startswith("all-"):
        return f"{AS_THEY_ARE}, but no {_and(visible.removeprefix('all-').split('-'))}"
    if visible in VISIBLE:
        return VISIBLE[visible]
    if visible.startswith("all-"):
        return f"everything but {_and(visible.removeprefix('all-').split('-'))}"
    names = visible.split("+")
    return _and(names) if len(names) > 1 else f"{visible} only"


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def setting_meaning(settings: Mapping[str, Any], modalities: tuple[str, ...] = TWO) -> str:
    """One line on a setting for its legend: "3 sites with images only, 7 with text only".

    Args:
        settings: Of a run.
        modalities: That rows of the data set have.
    """
    scenario, partition = settings["scenario"], settings["partition"]
    name = scenario["name"]
    if name == "missing" and not scenario.get("rates") and set(modalities) - set(TWO):
        return f"each row loses each of its modalities with a chance of {100 * scenario['rate']:g} %, independently"
    if name == "missing" and not scenario.get("rates"):
        return f"each row loses its text, and independently its image, with a chance of {100 * scenario['rate']:g} %"
    if name == "hybrid":
        return f"each site keeps each modality with a chance of {100 * scenario['keep_rate']:g} %"
    if name == "cross" and not scenario.get("clients"):
        images, total = scenario["num_image_clients"], partition.get("num_clients") or 0
        return f"{images} sites with images only, {total - images if total > images else 'the others'} with text only"
    if name == "aligned" and partition["name"] == "dirichlet":
        skew = "nearly even" if partition["alpha"] >= 3 else "uneven" if partition["alpha"] >= 0.8 else "very uneven"
        spread = f"values of {partition['column']!r}" if partition.get("column") else "labels"
        return f"{spread} are spread over sites by Dirichlet({partition['alpha']:g}): {skew}"
    if name == "cross":
        return "; ".join(
            f"{n} site{'s' if n > 1 else ''} with {visible_label(m)}" for m, n in scenario["clients"].items() if n
        )
    rates = _listed(scenario.get("rates") or {})
    hidden = "nothing is hidden" if name == "aligned" else f"{name}{f' ({rates})' if rates else ''}"
    if partition["name"] == "by-column":
        return f"{hidden}; each row names its site"
    return f"{hidden}; rows are assigned to sites by the {partition['name']} partition"


def method_label(settings: Mapping[str, Any], method: str, prompt: str) -> str:
    """ "FedAdam", "FedAdam + fedprox, agnostic prompt"."""
    head, _, objective = method.partition("+")
    words = _METHODS.get(head, head) + (f" + {objective}" if objective else "")
    return words if prompt == "plain" or method in ("majority", "question-prior") else f"{words}, {prompt} prompt"


def base_of(method: str, methods: Collection[str]) -> tuple[str, str] | None:
    """ "FedAdam, agnostic prompt" -> ("FedAdam", "agnostic prompt") where FedAdam is among the methods; else None."""
    head, *added = method.split(", ")
    for i, addition in enumerate(added):
        without = ", ".join([head, *added[:i], *added[i + 1 :]])
        if without in methods:
            return without, addition
    return None


def metric_label(metric: str) -> str:
    """ "macro_f1" -> "macro-F1"."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def order_of(scenario: str, setting: str) -> tuple[int, str, float]:
    """Sorting key: scenarios as in the paper, milder settings first."""
    known = list(SCENARIOS)
    numbers = re.findall(r"\d+(?:\.\d+)?", setting)
    first = float(numbers[0]) if numbers else 0.0
    return (
        known.index(scenario) if scenario in known else len(known),
        re.sub(r"[\d.]+", "", setting),
        -first if scenario in ("aligned", "hybrid") else first,
    )
