"""Write the pickles of this directory with the installed pandas: `python write_pickles.py DIRECTORY`."""

import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd


def write_pickles(directory: str) -> None:
    """Write one table as the installed pandas writes it: compressed, by protocol, and with other column types."""
    stem = f"{directory}/pandas{'.'.join(pd.__version__.split('.')[:2])}"
    frame = pd.DataFrame(
        {
            "system_prompt": ["You are terse.", "", "Réponds en français."],
            "question": ["What is 2 + 2?", "Name three rivers.", "Où est la tour Eiffel ? 🗼"],
            "score": [1, 2, 3],
            "ratio": [0.5, np.nan, 2.0],
            "flag": [True, False, True],
            "prompt_token_ids": [[1, 2, 3], [4, 5], [6]],
        }
    )
    frame.to_pickle(f"{stem}.pkl")
    frame.to_pickle(f"{stem}-protocol0.pkl", protocol=0)
    for compression in ("gz", "xz", "bz2"):
        frame[["system_prompt", "question"]].to_pickle(f"{stem}.pkl.{compression}")
    typed = frame[["question"]].copy()
    typed["string"] = pd.array(["a", "b", None], dtype="string")
    typed["category"] = pd.Categorical(["x", "y", "x"])
    typed["time"] = pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-03"])
    typed["integer"] = pd.array([1, None, 3], dtype="Int64")
    typed.to_pickle(f"{stem}-dtypes.pkl")
    if find_spec("pyarrow"):
        import pyarrow

        text = pd.array(["a", "ü", "c"], dtype="string[pyarrow]")
        other = pd.array(["d", None, "f"], dtype=pd.ArrowDtype(pyarrow.string()))
        pd.DataFrame({"question": text, "other": other}).to_pickle(f"{stem}-arrow.pkl")


if __name__ == "__main__":
    write_pickles(sys.argv[1])
