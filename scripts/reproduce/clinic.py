"""Write the tables of three clinics, and one of patients of all of them that no clinic has, for experiment=clinic.

    python -m scripts.reproduce.clinic FOLDER

The patients are those of scikit-learn's breast cancer data (Wolberg et al. 1995, CC BY 4.0). The clinics have unequal
numbers of them, and of malignant ones. A fifth of all values is missing; paris does not measure symmetry, and rome has
no large tumour. Only columns that tell little by themselves are kept: a clinic alone is worse than all together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer

# Benign and malignant patients of each clinic. The others, 90 and 61, are the test set.
CLINICS = {"berlin": (135, 115), "paris": (90, 30), "rome": (42, 6)}
NUMBERS = ("texture", "smoothness", "symmetry", "fractal dimension")
MISSING = 0.2


def tables() -> dict[str, pd.DataFrame]:
    """Return the table of each clinic, and that of the test set, by name."""
    data: Any = load_breast_cancer(as_frame=True)
    patients = pd.DataFrame({name.replace(" ", "_"): data.frame[f"mean {name}"] for name in NUMBERS})
    patients["size"] = pd.cut(data.frame["mean radius"], [0, 12, 16, np.inf], labels=["small", "medium", "large"])
    patients = patients.mask(np.random.default_rng(0).random(patients.shape) < MISSING)
    patients["diagnosis"] = np.where(data.target == 0, "malignant", "benign")
    left, found = patients.sample(frac=1, random_state=0), dict[str, pd.DataFrame]()
    for clinic, (benign, malignant) in CLINICS.items():
        is_malignant = left["diagnosis"] == "malignant"
        found[clinic] = pd.concat([left.loc[~is_malignant][:benign], left.loc[is_malignant][:malignant]])
        left = left.drop(found[clinic].index)
    found["paris"]["symmetry"] = None
    found["rome"].loc[found["rome"]["size"] == "large", "size"] = None
    return {**{clinic: table.sample(frac=1, random_state=1) for clinic, table in found.items()}, "test": left}


def write(folder: Path) -> None:
    """Write the tables: the clinics' in a folder of their own, which is the pooled data."""
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    for name, table in tables().items():
        path = folder / "test.csv" if name == "test" else folder / "sites" / f"{name}.csv"
        table.to_csv(path, index=False)
        print(f"{path}: {len(table)} patients, {(table.diagnosis == 'malignant').sum()} malignant")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
