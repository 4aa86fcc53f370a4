"""
Draws assets/ladder.svg, the losses of the whole runs, and assets/ladder_f1.svg, F1 on the way of the short ones.

    python docs/ladder/plots.py
"""

import json

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "scaledown"
import matplotlib.pyplot as plt  # noqa: E402


def read(run, key):
    rows = [json.loads(line) for line in open(f"out/{run}/metrics.jsonl")]
    return [x for x in rows if key in x]


def draw(name, plot, **axes):
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    plot(ax)
    ax.set(xlabel="examples seen", xlim=(0, None), **axes)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(f"assets/{name}.svg", metadata={"Date": None})


def losses(ax):
    runs = dict(gold8_alone="16x, questions alone", gold8="16x", gold16="8x", gold32="4x")
    for run, label in runs.items():
        rows = [x for x in read(run, "val_loss") if x["step"]]
        seen = [64 * x["step"] for x in rows]
        line, = ax.plot(seen, [x["val_loss"] for x in rows], marker="o", label=label)
        ax.plot(seen, [x["val_loss_shuffled"] for x in rows], ":", color=line.get_color())


def f1(ax):
    for run, label in dict(full="full text", gold32="4x", gold16="8x", gold8="16x", none="no passage").items():
        rows = read(f"{run}_seed2", "f1")
        ax.plot([32 * x["step"] for x in rows], [x["f1"] for x in rows], marker="o", label=label)


draw("ladder", losses, ylabel="loss (dotted: other questions' passages)")
draw("ladder_f1", f1, ylabel="F1 of 128 dev questions", ylim=(0, None))
