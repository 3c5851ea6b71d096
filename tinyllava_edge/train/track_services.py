"""Trackers that other packages bring: Weights & Biases, Trackio, MLflow. Each is opened only where it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..files import write_text
from .track_files import Run

PROJECT = "tinyllava-edge"


class Wandb:
    """Weights & Biases; `WANDB_MODE=offline`, `WANDB_PROJECT` and the like hold. Own files in `{out}.wandb/`."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own reports, to its makers
        import wandb

        folder = run.beside("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=str(folder),
            id=_run_id(folder / "run-id", run.resumed_from > 0),
            resume="allow",
            config={**run.recipe, "tinyllava_edge": __version__},
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.html = wandb.Html

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Figures below `train/`."""
        self.run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as preformatted HTML."""
        import html

        self.run.log({name: self.html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Trackio:
    """Trackio's local store (`TRACKIO_DIR`), or the Space that `TRACKIO_SPACE_ID` names."""

    def __init__(self, run: Run) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{_run_id(run.beside('trackio-run'), run.resumed_from > 0)}",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config={**run.recipe, "run": run.name, "tinyllava_edge": __version__},
            resume="allow",
            embed=False,
        )
        self.finish = trackio.finish  # the run's own would be called once more when the process ends

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Figures below `train/`."""
        self.run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as a value."""
        self.run.log({name: text}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.finish()


class Mlflow:
    """MLflow; `{out}.mlflow/` unless `MLFLOW_TRACKING_URI` names another store. Resuming makes a new run."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that needs no database package
        from mlflow.tracking import MlflowClient

        folder = run.beside("mlflow")
        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"file://{folder.resolve()}"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self.client.create_experiment(name)
        self.id = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
        for key, value in run.recipe.items():
            self.client.log_param(self.id, key, value)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics below `train/`."""
        for name, value in values.items():
            self.client.log_metric(self.id, f"train/{name}", value, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text file among the run's artifacts."""
        self.client.log_text(self.id, text, f"{name}/{step}.txt")

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.id)


def _run_id(place: Path, same: bool) -> str:
    """A name that a resumed run finds again; a fresh start makes another."""
    if same and place.is_file():
        return place.read_text(encoding="utf-8").strip()
    made = os.urandom(4).hex()
    write_text(place, made + "\n")
    return made
