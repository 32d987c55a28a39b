"""tools.serve.log and tools.serve.output on lines that TorchServe 0.12 printed."""

import io
import os
import threading
from pathlib import Path

from tools.serve.log import Record, busy_workers, java_error, parse, python_error
from tools.serve.output import Output
from tools.serve.store import Served

STAMP = "2026-11-20T16:37:42,268"
IDLE_STACK = """"W-9000-tiny_1.0" #16 prio=5 os_prio=0 cpu=27.62ms tid=0x00007efc8c54fff0 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
	at java.util.concurrent.LinkedBlockingDeque.poll(java.base@17.0.15/LinkedBlockingDeque.java:677)
	at org.pytorch.serve.wlm.Model.pollBatch(Model.java:482)
	at org.pytorch.serve.wlm.BatchAggregator.pollBatch(BatchAggregator.java:189)
	at org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:195)
"""
BUSY_STACK = """"W-9001-tiny_1.0" #17 prio=5 os_prio=0 cpu=27.91ms tid=0x00007efc8c54fff0 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
	at java.util.concurrent.ArrayBlockingQueue.poll(java.base@17.0.15/ArrayBlockingQueue.java:435)
	at org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:234)
"""
POOLED_STACK = """"W-9002-tiny_0.9" #30 prio=5 os_prio=0 cpu=12.70ms tid=0x00007f9cf8052150 waiting on condition
   java.lang.Thread.State: TIMED_WAITING (parking)
	at java.util.concurrent.SynchronousQueue.poll(java.base@17.0.15/SynchronousQueue.java:903)
	at java.util.concurrent.ThreadPoolExecutor.getTask(java.base@17.0.15/ThreadPoolExecutor.java:1061)
"""
READER_STACK = """"W-9000-tiny_1.0-stdout" #19 prio=5 os_prio=0 cpu=15.89ms tid=0x00007efbf00183d0 runnable
   java.lang.Thread.State: RUNNABLE
	at org.pytorch.serve.wlm.WorkerLifeCycle$ReaderThread.run(WorkerLifeCycle.java:382)
"""


def worker_line(message: str, worker: str = "tiny_1.0") -> str:
    return f"{STAMP} [INFO] [W-9000-{worker}-stdout] MODEL_LOG - {message}"


def served(name: str = "tiny") -> Served:
    return Served(Path(f"/store/{name}.mar"), name, "1.0", b"", "a.jpg", True, None, 0.005, 60, 60)


def output_of(lines: list[str], tmp_path: Path) -> Output:
    """An Output that has read `lines` to their end."""
    output = Output(io.StringIO("\n".join(lines) + "\n"), tmp_path / "log", lambda line: None, verbose=False)
    output.close()
    return output


def test_records() -> None:
    assert parse(worker_line("hello - world")) == Record("INFO", "MODEL_LOG", "hello - world", "tiny_1.0")
    line = f"{STAMP} [WARN] [W-9000-yolov5n-coco_7.0] org.pytorch.serve.wlm.BatchAggregator - Load model failed: x"
    record = parse(line)
    assert record is not None
    assert (record.worker, record.from_worker, record.worker_failed) == ("yolov5n-coco_7.0", False, True)
    for plain in ("\tat org.pytorch.serve.ModelServer.main(ModelServer.java:1)", "", "Model server started."):
        assert parse(plain) is None


def test_worker_that_starts() -> None:
    started = parse(worker_line("[PID]14562"))
    assert started is not None
    assert (started.pid, started.is_greeting) == (14562, True)
    for message in ("Torch worker started.", "Python runtime: 3.11.7", "model_name: tiny, batchSize: 1"):
        greeting = parse(worker_line(message))
        assert greeting is not None and greeting.is_greeting
    said = parse(worker_line("loaded 12 labels"))
    assert said is not None and not said.is_greeting and said.pid is None


def test_error_of_a_handler() -> None:
    lines = [
        "Backend worker process died.",
        "Traceback (most recent call last):",
        '  File "ts/model_service_worker.py", line 263, in <module>',
        "    worker.run_server()",
        "handlers.errors.BadSettings: handler.postprocess: score_threshold is 2, outside of 0 to 1",
    ]
    assert python_error(lines) == lines[-1]


def test_error_behind_what_torchserve_adds() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "ts/model_loader.py", line 108, in load',
        "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "Traceback (most recent call last):",
        '  File "ts/model_service_worker.py", line 263, in <module>',
        "ModuleNotFoundError: No module named 'ts.torch_handler.detection_handler'",
    ]
    assert python_error(lines) == "ModuleNotFoundError: No module named 'nothing_of_that_name'"
    lines = [
        "Failed to load model tiny, exception Error(s) in loading state_dict for Net:",
        "\tsize mismatch for a: x",
        "Traceback (most recent call last):",
        '  File "handler.py", line 3, in handle',
        "RuntimeError: Error(s) in loading state_dict for Net:",
        "\tsize mismatch for a: x",
        "Backend worker process died.",
        "Traceback (most recent call last):",
        "RuntimeError: 500 - Unknown exception",
    ]
    assert python_error(lines) == "RuntimeError: Error(s) in loading state_dict for Net: size mismatch for a: x"


def test_no_error() -> None:
    assert python_error(["about to go", "bye: x"]) is None


def test_error_of_java() -> None:
    lines = [
        "java.io.IOException: Failed to bind to address: http://127.0.0.1:8080",
        "\tat org.pytorch.serve.ModelServer.initializeServer(ModelServer.java:355)",
        "Caused by: io.netty.channel.unix.Errors$NativeIoException: bind(..) failed: Address already in use",
        "\t... 3 more",
    ]
    assert (
        java_error(lines) == "io.netty.channel.unix.Errors$NativeIoException: bind(..) failed: Address already in use"
    )
    assert java_error(["Invalid configuration: For input string"]) == "Invalid configuration: For input string"
    assert java_error(["Model server started."]) is None


def test_busy_workers() -> None:
    dump = "\n".join(
        ["Full thread dump OpenJDK 64-Bit Server VM:", "", IDLE_STACK, BUSY_STACK, POOLED_STACK, READER_STACK]
    ).splitlines()
    assert busy_workers(dump) == 1
    assert busy_workers([line for line in dump if line not in BUSY_STACK.splitlines()]) == 0


def test_failure_names_the_model_and_its_error(tmp_path: Path) -> None:
    lines = [
        worker_line("[PID]1", worker="other_1.0"),
        worker_line("Backend worker process died."),
        worker_line("Traceback (most recent call last):"),
        worker_line('  File "x.py", line 1, in x'),
        worker_line("ValueError: 3 labels for 4 classes"),
    ]
    output = output_of(lines, tmp_path)
    told = output.failure({"0.mar": served("other"), "1.mar": served()})
    assert told == "tiny 1.0: its worker failed to start: ValueError: 3 labels for 4 classes"


def test_failure_of_a_worker_without_a_word(tmp_path: Path) -> None:
    lines = [
        worker_line("about to go"),
        f"{STAMP} [ERROR] [W-9000-tiny_1.0] org.pytorch.serve.wlm.WorkerThread - Backend worker error",
        "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time",
    ]
    told = output_of(lines, tmp_path).failure({"0.mar": served()})
    assert told is not None
    assert "Backend worker did not respond in given time" in told
    assert told.endswith("its last line: about to go")


def test_failure_of_a_file_that_torchserve_cannot_load(tmp_path: Path) -> None:
    lines = [
        f"{STAMP} [WARN] [main] org.pytorch.serve.ModelServer - Failed to load model: 1.mar",
        "org.pytorch.serve.archive.model.InvalidModelException: Missing manifest",
    ]
    told = output_of(lines, tmp_path).failure({"0.mar": served("other"), "1.mar": served()})
    assert told is not None
    assert told.startswith("tiny 1.0: TorchServe cannot load /store/tiny.mar")
    assert "Missing manifest" in told


def test_no_failure(tmp_path: Path) -> None:
    assert output_of([worker_line("Torch worker started.")], tmp_path).failure({"0.mar": served()}) is None


def test_last_word_of_a_jvm(tmp_path: Path) -> None:
    chatter = [
        "WARNING: sun.reflect.Reflection.getCallerClass is not supported.",
        "Model server started.",
        "",
        "  indented",
    ]
    assert output_of(chatter, tmp_path).last_error() == "it gives no reason"
    assert (
        output_of(["Could not reserve enough space", *chatter], tmp_path).last_error()
        == "Could not reserve enough space"
    )
    lines = ["java.io.IOException: Failed to bind", "\tat x.y.Z", "Caused by: java.net.BindException: in use", *chatter]
    assert output_of(lines, tmp_path).last_error() == "java.net.BindException: in use"


def test_log_keeps_everything(tmp_path: Path) -> None:
    lines = [worker_line("hello"), "\tat x.y.Z", "é"]
    output_of(lines, tmp_path)
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == lines


def test_thread_dump_is_told_from_other_lines(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as source, os.fdopen(writing, "w") as sink:
        output = Output(source, tmp_path / "log", lambda line: None, verbose=False)

        def print_dump() -> None:
            lines = [
                "2026-11-20 16:38:08",
                BUSY_STACK,
                worker_line("between"),
                IDLE_STACK,
                "JNI global refs: 34",
                "Heap",
                "",
            ]
            threading.Timer(0.1, lambda: (sink.write("\n".join(lines)), sink.flush())).start()

        dump = output.thread_dump(print_dump, timeout=10)
        assert dump is not None
        assert busy_workers(dump) == 1
        assert output.thread_dump(lambda: None, timeout=0.1) is None
        sink.close()
        output.close()
