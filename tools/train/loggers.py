"""Where the figures of every epoch go besides `results.csv`."""

import os
import sys
from pathlib import Path

from pytorch_lightning.loggers import Logger, TensorBoardLogger

from tools.errors import ToolError
from tools.train.config import TrainSettings

PROJECT = "marina"


def make_loggers(settings: TrainSettings, run: Path) -> list[Logger]:
    """TensorBoard always, the others where asked for. Raises ToolError where one is not installed or not reached."""
    loggers: list[Logger] = [TensorBoardLogger(run, name="", version="tensorboard")]
    if settings.wandb:
        loggers.append(_wandb(settings, run))
    if settings.mlflow:
        loggers.append(_mlflow(settings, run))
    return loggers


def close_loggers() -> None:
    """So that the next training of this process starts new ones."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.finish()


def _wandb(settings: TrainSettings, run: Path) -> Logger:
    try:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        config = settings.model_dump(mode="json")
        silent = wandb.Settings(silent=True)
        return WandbLogger(
            experiment=wandb.init(project=PROJECT, name=run.name, dir=run, config=config, settings=silent)
        )
    except ModuleNotFoundError as error:
        raise ToolError("--wandb needs the package wandb: pip install '.[wandb]'") from error
    except (wandb.Error, OSError) as error:
        raise ToolError(f"W&B cannot start ({error}); log in, or set WANDB_MODE=offline") from error


def _mlflow(settings: TrainSettings, run: Path) -> Logger:
    # MLflow would rather have a database, which needs a server or more packages.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow.exceptions import MlflowException
        from pytorch_lightning.loggers import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        logger = MLFlowLogger(PROJECT, run.name, uri, save_dir=str(run.resolve() / "mlruns"))
        logger.log_hyperparams(settings.model_dump(mode="json"))
    except ModuleNotFoundError as error:
        raise ToolError("--mlflow needs the package mlflow-skinny: pip install '.[mlflow]'") from error
    except (MlflowException, OSError) as error:
        raise ToolError(f"MLflow cannot start ({error}); see MLFLOW_TRACKING_URI") from error
    return logger
