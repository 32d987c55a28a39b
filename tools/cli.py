"""The `marina` command."""

import argparse
import sys
from importlib import import_module

from handlers.errors import MarinaError

# A command is imported when it is called, so that the others cost nothing.
COMMANDS = {
    "import-checkpoint": ("tools.checkpoint.command", "a checkpoint to safetensors, without running it"),
    "data": ("tools.data.command", "labelled pictures in any form to a data set; look at one; draw one"),
    "train": ("tools.train.command", "a data set to weights, a report and a recipe"),
    "evaluate": ("tools.evaluate.command", "how good weights, an archive or a server are; quality gates; comparison"),
    "export": ("tools.export.command", "a recipe's network as a file of ONNX, OpenVINO or AOTInductor"),
    "archive": ("tools.archive.command", "build, inspect, verify and diff .mar files"),
    "drift": ("tools.watch.command", "how far traffic has gone from what an archive was evaluated on"),
    "serve": ("tools.serve.command", "serve a model store, by TorchServe or by our own ASGI server"),
    "predict": ("tools.client.command", "ask a server about pictures, folders, videos or streams"),
    "gateway": ("tools.gateway.command", "HTTP and KServe v2 before TorchServe: keys, limits, uploads, video, a page"),
    "shadow": ("tools.shadow.command", "how a candidate differs from the live model on a gateway's traffic; a verdict"),
    "detect-bulk": ("tools.bulk.command", "millions of pictures to Parquet and COCO JSON, with Ray"),
    "store": ("tools.store.command", "archives, weights, runs and data sets in S3 or a folder; tags; deployment"),
    "label": ("tools.labelstudio.command", "captured pictures to Label Studio, and annotations back to a data set"),
    "loop": ("tools.loop.command", "annotations to a model in production, where it is better than the one there"),
    "pipeline": ("tools.pipeline.command", "data set to deployed archive in one run, here or as in a cluster"),
    "image": ("tools.container.command", "the serving image with archives baked in"),
    "smoke": ("tools.smoke.command", "ask a running server for health, an answer and a refusal"),
    "doctor": ("tools.doctor.command", "what this machine lacks, and how to mend it"),
    "bench": ("tools.bench.command", "measure the handler and the build"),
    "tune": ("tools.tune.command", "the engine, workers and batches that serve a recipe fastest on this machine"),
}

# What `pip install .` leaves out, and the extra that brings it.
EXTRAS = {
    "aiohttp": "gateway",
    "av": "client",
    "cryptography": "sign",
    "fastapi": "gateway",
    "fastapi_offline": "gateway",
    "grpc": "client",
    "jwt": "gateway",
    "mss": "client",
    "multipart": "gateway",
    "prometheus_client": "gateway",
    "python_multipart": "gateway",
    "supervision": "client",
    "trackers": "client",
    "uvicorn": "gateway",
    "faster_coco_eval": "train",
    "matplotlib": "train",
    "mlflow": "mlflow",
    "nncf": "openvino",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "optuna": "train",
    "pytorch_lightning": "train",
    "rich": "train",
    "pyarrow": "bulk",
    "ray": "bulk",
    "s3fs": "s3",
    "tensorboard": "train",
    "wandb": "wandb",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 well, 1 with one line on stderr, 2 for wrong usage, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        args = _parser(called).parse_args(arguments)
        return import_module(COMMANDS[args.command][0]).run(args)
    except MarinaError as error:
        print(f"marina: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"marina: {called} needs {package}; pip install '.[{EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough; keep Python from complaining when it closes the stream.
        sys.stderr.close()
        return 0


def _parser(called: str | None) -> argparse.ArgumentParser:
    """With the flags of one command."""
    parser = argparse.ArgumentParser(prog="marina", description="Detection models, packed and served.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_line)
        if name == called:
            import_module(module).add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
